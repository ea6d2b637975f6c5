"""Tiny Wan pipelines, built from configs with random weights: every part is there, and nothing is downloaded."""

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

CHANNELS = 4
TEXT_DIM = 32
IMAGE_DIM = 16
WORDS = [
    "a",
    "red",
    "green",
    "blue",
    "square",
    "moves",
    "left",
    "right",
    "up",
    "down",
    "over",
    "black",
    "white",
    "ground",
    "slowly",
]


def tiny_transformer(i2v=False, layers=2, heads=2, head_dim=16, seed=0, pos_embed_seq_len=None):
    """A Wan transformer in float32; for image to video, one that takes a condition and image embeddings as Wan 2.1's does.

    With `pos_embed_seq_len` of 2 * 257 it takes a first and a last frame.
    """
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        # Image to video: noise, a mask of one channel for each of the 4 frames behind a latent one, and the condition.
        in_channels=CHANNELS + 4 + CHANNELS if i2v else CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=64,
        num_layers=layers,
        image_dim=IMAGE_DIM if i2v else None,
        added_kv_proj_dim=heads * head_dim if i2v else None,
        rope_max_seq_len=32,
        pos_embed_seq_len=pos_embed_seq_len,
    ).eval()


def tiny_vae(seed=0, **options):
    """A Wan VAE, 8x8 pixels and 4 frames to one latent, with a mean and deviation that differ from channel to channel."""
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.5, 2.0, 0.8],
        **options,
    ).eval()


def tiny_text_encoder(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "d_model": TEXT_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return UMT5EncoderModel(UMT5Config(**sizes)).eval()


def tiny_tokenizer():
    """One token a word of WORDS; other words are unknown."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_image_encoder(seed=0):
    """A CLIP vision model with the 257 tokens of Wan 2.1's."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": IMAGE_DIM, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=2)).eval()


def tiny_ti2v(seed=0):
    """As Wan 2.2 TI2V 5B for text to video: the VAE has 16x16 pixels to one latent, and each token has a timestep."""
    vae = tiny_vae(seed, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, is_residual=True)
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(seed), "vae": vae}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    return WanPipeline(**parts, scheduler=scheduler, transformer=tiny_transformer(layers=1, seed=seed), expand_timesteps=True)


def tiny_pipeline(i2v=False, transformer_2=False, seed=0, **options):
    """WanPipeline, or WanImageToVideoPipeline; with `transformer_2`, two transformers as in Wan 2.2.

    `options` go to tiny_transformer.
    """
    parts = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(seed),
        "vae": tiny_vae(seed),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": tiny_transformer(i2v, seed=seed, **options),
    }
    if transformer_2:
        parts |= {"transformer_2": tiny_transformer(i2v, seed=seed + 1, **options), "boundary_ratio": 0.5}
    if i2v:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        parts |= {"image_encoder": tiny_image_encoder(seed), "image_processor": processor}
    pipe = (WanImageToVideoPipeline if i2v else WanPipeline)(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
