"""A tiny model of each transformer class of Diffusers: what names of fields do not tell, and what it is called with.

Those that stand in `diffusers_families.py` already are taken from there.
"""

import functools
import inspect

import diffusers
import torch

from support.families import diffusers_families
from support.families.diffusers_image_families import image
from support.families.diffusers_parts import PADDED_TEXT, TEXT, randn
from support.families.diffusers_video_families import WAN, video

SIZES = {
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_heads", "nheads", "dit_heads", "num_cross_attention_heads"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_key_value_attention_heads"), 2),
    **dict.fromkeys(("audio_num_attention_heads", "text_num_attention_heads", "text_num_key_value_heads"), 2),
    **dict.fromkeys(("attention_head_dim", "head_dim", "cross_attention_head_dim", "audio_attention_head_dim"), 16),
    **dict.fromkeys(("num_layers", "n_layers", "depth", "dit_depth", "nlayers", "num_hidden_layers", "num_mmdit_layers"), 2),
    **dict.fromkeys(("num_single_layers", "num_single_dit_layers", "num_visual_blocks", "mmdit_layers"), 2),
    **dict.fromkeys(("num_refiner_layers", "n_refiner_layers", "num_text_blocks", "num_layerwise_text_blocks"), 1),
    **dict.fromkeys(("num_refiner_text_blocks", "num_text_layers", "num_decoder_layers"), 1),
    **dict.fromkeys(("hidden_size", "dim", "model_dim", "dit_dim", "embed_dim", "cross_attention_dim", "d_model"), 32),
    **dict.fromkeys(("audio_cross_attention_dim", "caption_projection_dim", "token_dim"), 32),
    **dict.fromkeys(("in_channels", "out_channels", "latent_channel", "io_channels", "latent_dim", "audio_in_channels"), 4),
    **dict.fromkeys(("audio_out_channels", "in_dim", "out_dim", "in_visual_dim", "out_visual_dim"), 4),
    **dict.fromkeys(("text_dim", "text_embed_dim", "joint_attention_dim", "caption_channels", "cap_feat_dim", "in_text_dim"), 16),
    **dict.fromkeys(("context_in_dim", "text_in_dim", "dit_text_dim", "llm_features_dim", "condition_dim"), 16),
    **dict.fromkeys(("cond_token_dim", "global_cond_dim", "cross_attention_input_dim", "text_hidden_dim"), 16),
    **dict.fromkeys(("pooled_projection_dim", "in_text_dim2", "image_dim", "image_embed_dim"), 8),
    **dict.fromkeys(("ffn_dim", "ff_dim", "intermediate_size", "ffn_hidden_size", "ff_inner_dim", "text_intermediate_size"), 32),
    **dict.fromkeys(("moe_intermediate_dim", "d_ff", "audio_acoustic_hidden_dim"), 32),
    **dict.fromkeys(("freq_dim", "time_embed_dim", "time_dim", "timestep_channels", "timestep_embed_dim", "adaln_dim"), 16),
    **dict.fromkeys(("time_embed_hidden_dim", "adaln_lora_dim", "timestep_features_dim", "time_proj_dim"), 16),
    **dict.fromkeys(("fourier_embedding_dim", "t_emb_dim", "dim_cond", "pair_repr_dim", "global_states_input_dim"), 16),
    **dict.fromkeys(("num_experts", "num_routed_experts"), 4),
    **dict.fromkeys(("sample_size", "sample_width", "sample_height", "pos_embed_max_size"), 8),
    "vocab_size": 64, "rope_max_seq_len": 32, "axes_dims_rope": (4, 6, 6), "axes_dim_rope": (4, 6, 6), "axes_dims": (4, 6, 6),
    "rope_axes_dim": (4, 6, 6), "rope_dim_list": [4, 6, 6], "axes_dim": [8, 8], "axes_lens": (64, 32, 32), "rotary_dim": 8,
    "rope_dim": (4, 6, 6), "dropout": 0.0,
}  # fmt: skip
"""What parameters of models are called, and what makes a model tiny."""


def text(dim=16, length=TEXT):
    return {"encoder_hidden_states": randn(1, length, dim)}


def latents(channels=4, side=8):
    return {"hidden_states": randn(1, channels, side, side), "timestep": torch.tensor([0.5])}


def wan_animate_2():
    """The pass over the reference, which fills a cache; the other pass is flex attention."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return {
        "hidden_states": [randn(4, 2, 8, 6)],
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": [randn(TEXT, 16)],
        "condition_latents": [randn(4, 2, 8, 6)],
        "kv_cache": WanAnimate2KVCache(2),
        "kv_cache_mode": "extract",
        "seq_len": 24,
        "offset_grid_sizes": torch.tensor([[2, 4, 3]]),
    }


def sana_wm_refiner(start=0, tokens=12):
    """A block of video tokens at a place of the video."""
    angles = torch.arange(start, start + tokens)[None, :, None] / torch.logspace(0, 2, 32)
    return {
        "hidden_states": randn(1, tokens, 4),
        "encoder_hidden_states": randn(1, TEXT, 16),
        "timestep": torch.full((1, tokens), 500.0),
        "video_rotary_emb": (angles.cos(), angles.sin()),
        "encoder_attention_mask": PADDED_TEXT,
    }


@functools.cache
def _of_families():
    """How to build one and what to call it with, by the name of the class; of its second family, with that family's name."""
    known = {}
    for family in diffusers_families.FAMILIES + diffusers_families.REFUSED:
        torch.manual_seed(0)
        name = type(family.make()).__name__
        known[f"{name} ({family.name})" if name in known else name] = (family.make, family.inputs)
    return known


def names():
    """All transformer models of the installed diffusers, and some of them in other settings."""
    from diffusers.models import ModelMixin, transformers

    found = (value for value in vars(transformers).values() if inspect.isclass(value) and issubclass(value, ModelMixin))
    return sorted({*(kind.__name__ for kind in found), *CLASSES, *_of_families()}, key=str.lower)


CLASSES = {
    "WanTransformer3DModel (Wan 2.1 FLF2V)": (
        WAN | {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 32, "pos_embed_seq_len": 514},
        lambda: video(channels=12, text=512) | {"encoder_hidden_states_image": randn(2, 257, 8)},
    ),
    "AceStepTransformer1DModel": (
        {"head_dim": 16, "sliding_window": 4, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "encoder_hidden_size": 32},
        lambda: (
            {
                "hidden_states": randn(1, 20, 4),
                "timestep": torch.tensor([0.5]),
                "timestep_r": torch.tensor([0.5]),
                "context_latents": randn(1, 20, 8),
            }
            | text(32)
        ),
    ),
    "AnyFlowTransformer3DModel": (
        WAN,
        lambda: video(timestep=((500, 500),)) | {"hidden_states": randn(1, 2, 4, 8, 6), "r_timestep": torch.tensor([[400, 400]])},
    ),
    "AnyFlowFARTransformer3DModel": (
        WAN | {"chunk_partition": (1, 1)},
        lambda: (
            video(timestep=((500, 500),))
            | {"hidden_states": randn(1, 2, 4, 8, 6), "r_timestep": torch.tensor([[400, 400]]), "chunk_partition": [1, 1]}
        ),
    ),
    "BriaFiboTransformer2DModel": (
        {"axes_dims_rope": [4, 6, 6], "text_encoder_dim": 16},
        lambda: image() | {"text_encoder_layers": [randn(1, TEXT, 16)] * 4},
    ),
    "BriaFibo2Transformer2DModel": (
        {
            "injection_layer_ids": (0,),
            "perceiver_num_layers": 1,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 4,
            "gist_min_text_len": 4,
            "gist_max_text_len": 32,
        },
        lambda: latents() | {"encoder_hidden_states": randn(1, 2, TEXT, 16)},
    ),
    "ConsisIDTransformer3DModel": ({"sample_frames": 5}, None),
    "CosmosTransformer3DModel": (
        {"max_size": (4, 8, 8), "extra_pos_embed_type": None, "concat_padding_mask": False},
        lambda: video(),
    ),
    "Cosmos3OmniTransformer": (
        {
            "dtype": "float64",
            "hidden_size": 32,
            "num_key_value_heads": 1,
            "latent_patch_size": 2,
            "patch_latent_dim": 16,
            "rope_axes_dim": (2, 3, 3),
        },
        lambda: {
            "input_ids": torch.arange(5) % 64,
            "text_indexes": torch.arange(5),
            "position_ids": torch.arange(29).expand(3, -1),
            "und_len": 5,
            "sequence_length": 29,
            "vision_tokens": [randn(1, 4, 2, 8, 6)],
            "vision_token_shapes": [(2, 4, 3)],
            "vision_sequence_indexes": torch.arange(5, 29),
            "vision_mse_loss_indexes": torch.arange(5, 29),
            "vision_timesteps": torch.full((24,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(2)],
        },
    ),
    "EasyAnimateTransformer3DModel": ({"in_channels": 4, "patch_size": 2}, None),
    "ErnieImageTransformer2DModel": (
        {},
        lambda: latents() | {"text_bth": randn(1, TEXT, 16), "text_lens": torch.tensor([6])},
    ),
    "Flux3Transformer2DModel": (
        {"axes_dims_rope": (4, 4, 4, 4), "cond_in_channels": 4},
        lambda: image(ids=4) | {"image_cond_hidden_states": randn(1, 16, 4), "image_cond_ids": image(ids=4)["img_ids"] + 1},
    ),
    "GlmImageTransformer2DModel": (
        {"prior_vq_quantizer_codebook_size": 32},
        lambda: (
            latents()
            | text()
            | {
                "timestep": torch.tensor([500]),
                "prior_token_id": torch.arange(16)[None],
                "prior_token_drop": torch.tensor([False]).expand(1, 16),
                "target_size": torch.tensor([[64.0, 64.0]]),
                "crop_coords": torch.tensor([[0.0, 0.0]]),
            }
        ),
    ),
    "HeliosTransformer3DModel": (
        {"ffn_dim": 32},
        lambda: (
            video()
            | {
                "indices_hidden_states": torch.arange(4, 6)[None],
                "indices_latents_history_short": torch.arange(3, 4)[None],
                "indices_latents_history_mid": torch.arange(1, 3)[None],
                "indices_latents_history_long": torch.arange(0, 4)[None],
                "latents_history_short": randn(1, 4, 1, 8, 6),
                "latents_history_mid": randn(1, 4, 2, 8, 6),
                "latents_history_long": randn(1, 4, 4, 8, 6),
            }
        ),
    ),
    "HiDreamImageTransformer2DModel": (
        {"patch_size": 2, "caption_channels": [16, 16], "llama_layers": [0, 1], "axes_dims_rope": (8, 4, 4), "text_emb_dim": 8},
        None,
    ),
    "HunyuanDiT2DModel": ({"in_channels": 4, "patch_size": 2, "cross_attention_dim_t5": 16, "pooled_projection_dim": 16}, None),
    "HunyuanVideoFramepackTransformer3DModel": (
        {"image_condition_type": None, "has_image_proj": True, "image_proj_dim": 12, "has_clean_x_embedder": True},
        lambda: (
            video()
            | {
                "pooled_projections": randn(1, 8),
                "encoder_attention_mask": PADDED_TEXT,
                "guidance": torch.tensor([6.0]),
                "image_embeds": randn(1, 5, 12),
                "indices_latents": torch.arange(7, 9),
                "latents_clean": randn(1, 4, 2, 8, 6),
                "indices_latents_clean": torch.tensor([0, 6]),
                "latents_history_2x": randn(1, 4, 2, 8, 6),
                "indices_latents_history_2x": torch.arange(4, 6),
                "latents_history_4x": randn(1, 4, 4, 8, 6),
                "indices_latents_history_4x": torch.arange(0, 4),
            }
        ),
    ),
    "Ideogram4Transformer2DModel": (
        {"mrope_section": (4, 2, 2)},
        lambda: {
            "hidden_states": randn(1, 40, 4),
            "timestep": torch.tensor([0.5]),
            "encoder_hidden_states": randn(1, 40, 16),
            "position_ids": torch.arange(40)[None, :, None].expand(1, 40, 3),
            "segment_ids": torch.tensor([[0] * 22 + [1] * 18]),
            "indicator": torch.tensor([([3] * 6 + [2] * 16) + ([3] * 2 + [2] * 16)]),
        },
    ),
    "JoyImageEditTransformer3DModel": ({}, lambda: video(timestep=(500.0,))),
    "JoyImageEditPlusTransformer3DModel": (
        {},
        lambda: (
            {
                "hidden_states": randn(1, 24, 4, 1, 2, 2),
                "timestep": torch.tensor([500.0]),
                "encoder_hidden_states_mask": PADDED_TEXT,
                "shape_list": [[(1, 4, 3), (1, 4, 3)]],
            }
            | text()
        ),
    ),
    "Kandinsky6Transformer3DModel": (
        {"in_audio_dim": 4, "out_audio_dim": 4, "visual_cond": False},
        lambda: (
            {
                "hidden_states": randn(1, 2, 8, 6, 4),
                "timestep": torch.tensor([500.0]),
                "pooled_projections": randn(1, 8),
                "audio_hidden_states": randn(1, 5, 4),
                "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(3)),
            }
            | text()
        ),
    ),
    "Kandinsky6SRTransformer3DModel": ({"tile_sizes": ((8, 8),)}, None),
    "Krea2Transformer2DModel": (
        {"num_key_value_heads": 1, "num_text_layers": 2, "text_hidden_dim": 32},
        lambda: {
            "hidden_states": randn(1, 16, 4),
            "encoder_hidden_states": randn(1, TEXT, 2, 32),
            "timestep": torch.tensor([0.5]),
            "position_ids": torch.arange(25)[:, None].expand(25, 3),
            "encoder_attention_mask": PADDED_TEXT.bool(),
        },
    ),
    "LatteTransformer3DModel": ({"patch_size": 2, "norm_type": "ada_norm_single", "video_length": 2}, None),
    "LongCatAudioDiTTransformer": (
        {},
        lambda: (
            {
                "hidden_states": randn(1, 20, 4),
                "encoder_attention_mask": PADDED_TEXT.bool(),
                "timestep": torch.tensor([0.5]),
                "latent_cond": randn(1, 20, 4),
            }
            | text()
        ),
    ),
    "LongCatImageTransformer2DModel": ({"axes_dims_rope": [4, 6, 6]}, image),
    "Lumina2Transformer2DModel": ({}, None),
    "MiniMaxMusic3Transformer1DModel": (
        {},
        lambda: {"hidden_states": randn(1, 4, 20), "timestep": torch.tensor([0.5]), "encoder_hidden_states": randn(1, 20, 16)},
    ),
    "MiniMaxMusic3RVQDepthDecoder": ({"audio_vocab_size": 16, "num_codebooks": 2}, lambda: {"inputs_embeds": randn(1, 3, 32)}),
    "MotifVideoTransformer3DModel": ({"patch_size": 2}, lambda: video() | {"encoder_attention_mask": PADDED_TEXT}),
    "NucleusMoEImageTransformer2DModel": (
        {
            "num_layers": 5,
            "mlp_ratio": 8.0,
            "capacity_factors": 2.0,
            "num_key_value_heads": 1,
            "in_channels": 16,
            "out_channels": 4,
        },
        lambda: (
            {
                "hidden_states": randn(1, 16, 16),
                "encoder_hidden_states_mask": PADDED_TEXT,
                "timestep": torch.tensor([0.5]),
                "img_shapes": [(1, 4, 4)],
            }
            | text()
        ),
    ),
    "OvisImageTransformer2DModel": ({}, image),
    "PRXTransformer2DModel": ({}, lambda: latents() | text() | {"attention_mask": PADDED_TEXT.bool()}),
    "QwenImage21Transformer2DModel": (
        {},
        lambda: (
            {
                "hidden_states": randn(1, 16, 4),
                "timestep": torch.tensor([0.5]),
                "img_shapes": [[(1, 4, 4)]],
                "img_mask": torch.tensor([[False] * TEXT + [True] * 4]),
            }
            | text()
        ),
    ),
    "SanaVideoTransformer3DModel": (
        {"mlp_ratio": 2.0},
        lambda: video() | {"encoder_attention_mask": PADDED_TEXT},
    ),
    "SanaWMTransformer3DModel": ({"linear_head_dim": 16, "softmax_every_n": 2, "use_chunk_plucker_post_attn": False}, None),
    "SanaWMLTX2RefinerTransformer3DModel": ({}, sana_wm_refiner),
    "StableAudio3DiTModel": (
        {"num_memory_tokens": 4, "local_add_cond_dim": 5},
        lambda: (
            {
                "hidden_states": randn(1, 4, 20),
                "timestep": torch.tensor([0.5]),
                "global_hidden_states": randn(1, 16),
                "encoder_attention_mask": PADDED_TEXT,
                "local_add_cond": randn(1, 5, 20),
            }
            | text()
        ),
    ),
    "WanAnimate2Transformer3DModel": (
        {"use_img_emb": False, "text_len": TEXT, "in_dim": 8},
        wan_animate_2,
    ),
    "AuraFlowTransformer2DModel": ({}, None),
    "CogView3PlusTransformer2DModel": ({}, None),
    "CogView4Transformer2DModel": ({"rope_axes_dim": (8, 8)}, None),
    "LuminaNextDiT2DModel": ({"hidden_size": 32}, None),
    "OmniGenTransformer2DModel": (
        {"pad_token_id": 0, "rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1.0] * 8}},
        None,
    ),
    "Transformer2DModel": ({"in_channels": 32, "norm_num_groups": 4}, None),
    "DreamLiteTransformer2DModel": ({"in_channels": 32}, None),
    "TransformerTemporalModel": ({"in_channels": 32, "norm_num_groups": 4}, None),
    "T5FilmDecoder": ({"num_heads": 2, "d_kv": 16}, None),
    "PriorTransformer": ({"embedding_dim": 16}, None),
    "RFD4ProteinaTransformer": ({}, None),
}
"""By the name of the class, or that and the name of a kind of models: settings, and what to call the model with. None: it is
enough to build it, since it is refused as a whole, or nobody knows."""


def tiny(name):
    """A tiny model of a class, and how to call it (None: not known here)."""
    known = _of_families()
    if name in known:
        make, inputs = known[name]
        return make(), inputs
    settings, inputs = CLASSES.get(name, ({}, None))
    kind = getattr(diffusers.models.transformers, name.partition(" (")[0])
    parameters = inspect.signature(kind.__init__).parameters
    return kind(**{key: size for key, size in SIZES.items() if key in parameters} | settings), inputs
