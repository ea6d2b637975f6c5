"""The families of Diffusers: tiny models of those that can be patched, and those that are refused as a whole."""

from diffusers import (
    CogVideoXTransformer3DModel,
    MochiTransformer3DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)

from support.families import diffusers_image_families, diffusers_video_families
from support.families.diffusers_parts import HEADS
from support.families.families import Family

FAMILIES = diffusers_video_families.FAMILIES + diffusers_image_families.FAMILIES
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
