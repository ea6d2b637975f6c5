"""Tiny models of Diffusers, a family each: how to build one, what to call it with, and what its attention is."""

import torch
from diffusers import (
    ChromaTransformer2DModel,
    CogVideoXTransformer3DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from families import Family

FUSED = {"fused QKV, training": "expected separate projections for training, got those of fuse_qkv_projections"}
NO_FUSING = {"not_applicable": ("fused QKV, inference", "fused QKV, training")}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN = HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
DUAL = HEADS | {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 16, "in_channels": 4}
TEXT, PADDED_TEXT = 9, torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * 100 + shape[-1]))


def video(channels=4, text_dim=16, text=TEXT, timestep=(500,)):
    return {
        "hidden_states": randn(1, channels, 2, 8, 6),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": randn(1, text, text_dim),
    }


def image(tokens=16, ids=3):
    places = torch.arange(tokens)
    return {
        "hidden_states": randn(1, tokens, 4),
        "encoder_hidden_states": randn(1, TEXT, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([*[torch.zeros_like(places)] * (ids - 2), places // 4, places % 4], 1),
        "txt_ids": torch.zeros(TEXT, ids),
    }


def wan_i2v():
    return WanTransformer3DModel(**WAN | {"in_channels": 12}, num_layers=2, image_dim=8, added_kv_proj_dim=32)


def hunyuan():
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1}
    text = {"text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6)}
    return HunyuanVideoTransformer3DModel(**HEADS, in_channels=4, out_channels=4, **sizes, **text)


def hunyuan15():
    sizes = {"num_layers": 2, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "rope_axes_dim": (4, 6, 6)}
    text = {"text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 12}
    return HunyuanVideo15Transformer3DModel(**HEADS, in_channels=4, out_channels=4, **sizes, **text)


def vace():
    return WanVACETransformer3DModel(**WAN, num_layers=2, vace_layers=[0], vace_in_channels=8)


FAMILIES = [
    Family("Wan 2.1 T2V, Wan 2.2 A14B", lambda: WanTransformer3DModel(**WAN, num_layers=2), video, calls=4, refused_modes=FUSED),
    Family(
        "Wan 2.1 I2V",
        wan_i2v,
        lambda: video(channels=12, text=512) | {"encoder_hidden_states_image": randn(1, 257, 8)},
        calls=6,
        refused_modes=FUSED,
    ),
    # expand_timesteps: one timestep for each of 2 * 4 * 3 tokens
    Family(
        "Wan 2.2 TI2V 5B",
        lambda: WanTransformer3DModel(**WAN, num_layers=2),
        lambda: video() | {"timestep": torch.linspace(0, 900, 24)[None]},
        calls=4,
        refused_modes=FUSED,
    ),
    Family(
        "Wan VACE",
        vace,
        lambda: video() | {"control_hidden_states": randn(1, 8, 2, 8, 6), "control_hidden_states_scale": torch.ones(1)},
        calls=6,
        refused_modes=FUSED,
    ),
    Family(
        "SkyReels V2",
        lambda: SkyReelsV2Transformer3DModel(**WAN, num_layers=2),
        video,
        calls=4,
        refused_modes=FUSED,
    ),
    Family(
        "LTX Video",
        lambda: LTXVideoTransformer3DModel(
            **HEADS, in_channels=4, out_channels=4, cross_attention_dim=32, num_layers=2, caption_channels=16
        ),
        lambda: {
            "hidden_states": randn(1, 24, 4),
            "encoder_hidden_states": randn(1, TEXT, 16),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": PADDED_TEXT,
            "num_frames": 2,
            "height": 4,
            "width": 3,
        },
        calls=4,
        mask="additive",
        refused_modes=FUSED,
    ),
    Family(
        "HunyuanVideo",
        hunyuan,
        lambda: (
            video() | {"pooled_projections": randn(1, 8), "encoder_attention_mask": PADDED_TEXT, "guidance": torch.tensor([6.0])}
        ),
        calls=2,
        skipped=1,
        mask="bool",
        **NO_FUSING,
    ),
    Family(
        "HunyuanVideo 1.5",
        hunyuan15,
        lambda: (
            video(timestep=(500.0,))
            | {
                "encoder_attention_mask": PADDED_TEXT,
                "encoder_hidden_states_2": randn(1, TEXT, 8),
                "encoder_attention_mask_2": PADDED_TEXT,
                "image_embeds": randn(1, 5, 12),
            }
        ),
        calls=2,
        skipped=1,
        mask="bool",
        not_applicable=(*NO_FUSING["not_applicable"], "`torch.compile(fullgraph=True)`, training"),  # looks at its inputs
    ),
    Family(
        "Flux",
        lambda: FluxTransformer2DModel(**DUAL, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8)),
        lambda: image() | {"pooled_projections": randn(1, 8)},
        calls=3,
        refused_modes=FUSED,
    ),
    Family(
        "Flux 2",
        lambda: Flux2Transformer2DModel(**DUAL, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4)),
        lambda: image(ids=4) | {"guidance": torch.tensor([3.5])},
        calls=3,
        refused_modes=FUSED,
    ),
    Family(
        "Chroma",
        lambda: ChromaTransformer2DModel(
            **DUAL, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
        ),
        image,
        calls=3,
        refused_modes=FUSED,
    ),
    Family(
        "Qwen-Image",
        lambda: QwenImageTransformer2DModel(
            **HEADS, in_channels=4, out_channels=1, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6)
        ),
        lambda: {
            "hidden_states": randn(1, 16, 4),
            "encoder_hidden_states": randn(1, TEXT, 16),
            "encoder_hidden_states_mask": PADDED_TEXT,
            "timestep": torch.tensor([0.5]),
            "img_shapes": [(1, 4, 4)],
        },
        calls=2,
        mask="bool",
        **NO_FUSING,
    ),
]

_OWN_WAY = "does not go through diffusers' attention dispatcher"
REFUSED = [
    Family("CogVideoX", lambda: CogVideoXTransformer3DModel(**HEADS, num_layers=1, text_embed_dim=8), refused=_OWN_WAY),
    Family(
        "Stable Diffusion 3",
        lambda: SD3Transformer2DModel(
            **HEADS,
            sample_size=8,
            in_channels=4,
            num_layers=1,
            joint_attention_dim=8,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=8,
        ),
        refused=_OWN_WAY,
    ),
    Family(
        "Mochi",
        lambda: MochiTransformer3DModel(
            **HEADS, num_layers=1, pooled_projection_dim=32, in_channels=4, text_embed_dim=8, time_embed_dim=8
        ),
        refused=_OWN_WAY,
    ),
    Family(
        "Sana",
        lambda: SanaTransformer2DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=8,
            sample_size=8,
        ),
        refused=_OWN_WAY,
    ),
]
