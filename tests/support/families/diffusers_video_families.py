"""Tiny video models of Diffusers, a family each: how to build one, what to call it with, and what its attention is."""

import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from support.families.diffusers_parts import BLOCKS, FULLGRAPH, FUSED, HEADS, PADDED_TEXT, TEXT, randn, without
from support.families.families import Family

WAN = HEADS | {"in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}


def video(channels=4, text_dim=16, text=TEXT, timestep=(500,)):
    return {
        "hidden_states": randn(1, channels, 2, 8, 6),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": randn(1, text, text_dim),
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


ANIMATE = {
    "in_channels": 12,
    "latent_channels": 4,
    "image_dim": 8,
    "added_kv_proj_dim": 32,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 16,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 1,
}


def animate():
    """A reference frame and two of the video; five pictures of the face."""
    return video(channels=12, text=512) | {
        "hidden_states": randn(1, 12, 3, 8, 6),
        "encoder_hidden_states_image": randn(1, 257, 8),
        "pose_hidden_states": randn(1, 4, 2, 8, 6),
        "face_pixel_values": randn(1, 3, 5, 16, 16),
    }


def minimax_h3():
    sizes = {"hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 4, "audio_in_channels": 4}
    time = {"freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 16, "rope_freq_dim": 2}
    return MiniMaxH3Transformer3DModel(**HEADS, **sizes, **time, text_dim=16)


def minimax_h3_inputs():
    """One row of text, then video, then audio, which have a timestep each."""
    return {
        "hidden_states": randn(1, 24, 16),
        "audio_hidden_states": randn(1, 5, 4),
        "encoder_hidden_states": randn(1, TEXT, 16),
        "timestep": torch.tensor([0.5, 0.9]),
        "timestep_indices": torch.tensor([0] * (TEXT + 24) + [1] * 5),
        "token_tags": torch.tensor([1] * TEXT + [0] * 24 + [2] * 5),
        "position_ids": torch.arange(TEXT + 29)[:, None].expand(-1, 3),
        "text_indices": torch.arange(TEXT),
        "video_indices": torch.arange(TEXT, TEXT + 24),
        "audio_indices": torch.arange(TEXT + 24, TEXT + 29),
    }


NO_BOUNDS = "torch.compile cannot look for the bounds in it"


FAMILIES = [
    Family("Wan 2.1 T2V, Wan 2.2 A14B", lambda: WanTransformer3DModel(**WAN, num_layers=2), video, calls=4, refused_modes=FUSED),
    Family(
        "Wan 2.1 I2V",
        wan_i2v,
        lambda: video(channels=12, text=512) | {"encoder_hidden_states_image": randn(1, 257, 8)},
        calls=6,
        no_k_shift=("*.attn2",),
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
        "SkyReels V2, causal by chunks of frames",
        lambda: SkyReelsV2Transformer3DModel(**WAN, num_layers=2, num_frame_per_block=2),
        lambda: (
            video(timestep=((900, 900, 500, 500),)) | {"hidden_states": randn(1, 4, 4, 8, 6), "enable_diffusion_forcing": True}
        ),
        calls=4,
        refused_modes=FUSED | {FULLGRAPH: NO_BOUNDS, BLOCKS: NO_BOUNDS},
    ),
    Family(
        "Wan Animate",
        lambda: WanAnimateTransformer3DModel(**WAN | ANIMATE, num_layers=2),
        animate,
        calls=8,
        no_k_shift=("*.attn2",),
        refused_modes=FUSED,
        not_applicable=(FULLGRAPH,),
    ),
    Family("MiniMax-H3", minimax_h3, minimax_h3_inputs, calls=3, refused_modes=FUSED),
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
        **without(),
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
        **without(FULLGRAPH),  # it branches on its inputs
    ),
    Family(
        "ChronoEdit",
        lambda: ChronoEditTransformer3DModel(**WAN, num_layers=2, rope_temporal_skip_len=8),
        video,
        calls=4,
        refused_modes=FUSED,
    ),
    Family(
        "Kandinsky 5",
        lambda: Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        lambda: {
            "hidden_states": randn(1, 2, 8, 6, 4),
            "encoder_hidden_states": randn(1, TEXT, 16),
            "timestep": torch.tensor([500.0]),
            "pooled_projections": randn(1, 8),
            "visual_rope_pos": (torch.arange(2), torch.arange(4), torch.arange(3)),
            "text_rope_pos": torch.arange(TEXT),
        },
        calls=5,
        **without("bfloat16"),
    ),
    Family(
        "LTX 2",
        lambda: LTX2VideoTransformer3DModel(
            **HEADS,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=32,
            num_layers=1,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=16,
            audio_cross_attention_dim=32,
            caption_channels=16,
        ),
        lambda: {
            "hidden_states": randn(1, 24, 4),
            "audio_hidden_states": randn(1, 5, 4),
            "encoder_hidden_states": randn(1, TEXT, 16),
            "audio_encoder_hidden_states": randn(1, TEXT, 16),
            "timestep": torch.tensor([500.0]),
            "encoder_attention_mask": PADDED_TEXT,
            "audio_encoder_attention_mask": PADDED_TEXT,
            "num_frames": 2,
            "height": 4,
            "width": 3,
            "audio_num_frames": 5,
        },
        calls=6,
        mask="additive",
        refused_modes=FUSED,
    ),
]
