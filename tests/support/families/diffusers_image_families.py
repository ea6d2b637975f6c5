"""Tiny image models of Diffusers, a family each: how to build one, what to call it with, and what its attention is."""

import torch
from diffusers import (
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanImageTransformer2DModel,
    QwenImageTransformer2DModel,
    ZImageTransformer2DModel,
)

from support.families.diffusers_parts import BLOCKS, CHECKPOINTING, FULLGRAPH, FUSED, HEADS, PADDED_TEXT, TEXT, randn, without
from support.families.families import Family

DUAL = HEADS | {"num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 16, "in_channels": 4}


def image(tokens=16, ids=3):
    places = torch.arange(tokens)
    return {
        "hidden_states": randn(1, tokens, 4),
        "encoder_hidden_states": randn(1, TEXT, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.stack([*[torch.zeros_like(places)] * (ids - 2), places // 4, places % 4], 1),
        "txt_ids": torch.zeros(TEXT, ids),
    }


FAMILIES = [
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
        **without(),
    ),
    Family(
        "HunyuanImage",
        lambda: HunyuanImageTransformer2DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(8, 8),
        ),
        lambda: {
            "hidden_states": randn(1, 4, 4, 4),
            "timestep": torch.tensor([500.0]),
            "encoder_hidden_states": randn(1, TEXT, 16),
            "encoder_attention_mask": PADDED_TEXT,
        },
        calls=2,
        skipped=1,
        mask="bool",
        **without(CHECKPOINTING, FULLGRAPH),
    ),
    Family("Bria", lambda: BriaTransformer2DModel(**DUAL, axes_dims_rope=[4, 4, 8]), image, calls=3, **without(BLOCKS)),
    Family(
        "Z-Image",
        lambda: ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 8],
            axes_lens=[64, 32, 32],
        ),
        lambda: {"x": [randn(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [randn(TEXT, 16)]},
        calls=4,
        **without(),
    ),
]
