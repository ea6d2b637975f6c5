"""Tiny pipelines for video, of the kinds that people run beside Wan's own: how to build one, and how to call it.

Each function gives a pipeline, and what runs it from embeddings to latents, which it returns.
"""

import numpy as np
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from support.families.diffusers_parts import HEADS
from support.families.diffusers_video_families import ANIMATE
from support.families.families import lively
from support.models.tiny_wan import (
    CHANNELS,
    IMAGE_DIM,
    TEXT_DIM,
    tiny_image_encoder,
    tiny_text_encoder,
    tiny_tokenizer,
    tiny_vae,
)

SIZE = {"height": 32, "width": 32}
WAN = HEADS | {"out_channels": CHANNELS, "text_dim": TEXT_DIM, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 64}
WAN |= {"num_layers": 2}
FROM_IMAGES = {"in_channels": 2 * CHANNELS + 4, "image_dim": IMAGE_DIM, "added_kv_proj_dim": 32}


def embeddings(name, length=512):
    return torch.randn(1, length, TEXT_DIM, generator=torch.Generator().manual_seed(len(name)))


def picture(number=0, side=32):
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _pipeline(kind, transformer, images=False, **options):
    torch.manual_seed(0)
    parts = {"tokenizer": tiny_tokenizer(), "text_encoder": tiny_text_encoder(), "vae": tiny_vae()}
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "transformer": lively(transformer).eval()}
    if images:
        processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        parts |= {"image_encoder": tiny_image_encoder(), "image_processor": processor}
    pipe = kind(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _run(pipe, **inputs):
    inputs = {"prompt_embeds": embeddings("prompt"), **SIZE} | inputs

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe(**inputs, num_inference_steps=1, guidance_scale=1.0, output_type="latent", generator=generator).frames

    return run


def first_and_last_frame():
    """FLF2V, as Wan 2.1 has it: two images, 2 x 257 of their tokens."""
    pipe = _pipeline(WanImageToVideoPipeline, WanTransformer3DModel(**WAN | FROM_IMAGES, pos_embed_seq_len=2 * 257), images=True)
    return pipe, _run(pipe, num_frames=5, image=picture(0), last_image=picture(1))


def ti2v_5b():
    """Wan 2.2 TI2V 5B: a timestep for each token."""
    pipe = _pipeline(WanPipeline, WanTransformer3DModel(**WAN, in_channels=CHANNELS), expand_timesteps=True)
    return pipe, _run(pipe, num_frames=5)


def ti2v_5b_from_an_image():
    pipe = _pipeline(WanImageToVideoPipeline, WanTransformer3DModel(**WAN, in_channels=CHANNELS), expand_timesteps=True)
    return pipe, _run(pipe, num_frames=5, image=picture())


def vace():
    transformer = WanVACETransformer3DModel(**WAN, in_channels=CHANNELS, vace_layers=[0], vace_in_channels=2 * CHANNELS + 64)
    pipe = _pipeline(WanVACEPipeline, transformer)
    return pipe, _run(pipe, num_frames=5, video=[picture(i) for i in range(5)], mask=[Image.new("L", (32, 32), 255)] * 5)


def animate():
    settings = WAN | ANIMATE | FROM_IMAGES
    pipe = _pipeline(WanAnimatePipeline, WanAnimateTransformer3DModel(**settings), images=True)
    pictures = [picture(i) for i in range(5)]
    run = _run(pipe, image=picture(), pose_video=pictures, face_video=pictures, segment_frame_length=5)
    return pipe, run


def modular_wan():
    pipe = WanCoreDenoiseStep().init_pipeline()
    torch.manual_seed(0)
    channels = pipe.num_channels_latents  # those of the published VAE, as long as there is none
    transformer = lively(WanTransformer3DModel(**WAN | {"in_channels": channels, "out_channels": channels})).eval()
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe.update_components(transformer=transformer, scheduler=scheduler)

    def run():
        text = {"prompt_embeds": embeddings("prompt"), "negative_prompt_embeds": embeddings("negative")}
        generator = torch.Generator().manual_seed(0)
        return pipe(**text, **SIZE, num_frames=5, num_inference_steps=1, generator=generator, output="latents")

    return pipe, run


def minimax_h3_transformer():
    settings = HEADS | {"hidden_size": 32, "ffn_dim": 32, "num_layers": 2, "num_refiner_layers": 1, "text_dim": TEXT_DIM}
    time = {"freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2}
    torch.manual_seed(0)
    return lively(MiniMaxH3Transformer3DModel(**settings, **time)).eval()


def minimax_h3():
    """Text to video and sound: 5 seconds of 32 x 32 pixels."""
    pipe = MiniMaxH3CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=minimax_h3_transformer(), scheduler=MiniMaxH3Scheduler(), audio_scheduler=MiniMaxH3Scheduler()
    )

    def run():
        text = {"prompt_embeds": embeddings("prompt", 9), "text_token_tags": torch.ones(9, dtype=torch.long)}
        generator = torch.Generator().manual_seed(0)
        return pipe(**text, **SIZE, num_inference_steps=2, generator=generator, output="latents")

    return pipe, run
