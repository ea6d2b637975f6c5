"""What tiny models of Diffusers are built from and called with."""

import torch

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
TEXT, PADDED_TEXT = 9, torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
FUSED = {"fused QKV, training": "expected separate projections for training, got those of fuse_qkv_projections"}
CHECKPOINTING, FULLGRAPH, BLOCKS = (
    "gradient checkpointing",
    "`torch.compile(fullgraph=True)`, training",
    "`compile_repeated_blocks`",
)


def without(*modes):
    """Diffusers has no fused projections for this family, and fails in these modes by itself."""
    return {"not_applicable": ("fused QKV, inference", "fused QKV, training", *modes)}


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) * 100 + shape[-1]))
