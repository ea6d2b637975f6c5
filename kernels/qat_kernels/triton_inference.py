"""Attention without gradients on FP4 matrix units: prepares packed operands, chooses tiles and launches _inference.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import reference
from ._inference import TRITON, inference_kernel
from ._layout import Sequences
from ._quantize import Codes, allowed_keys, block_of, quantize_rows, quantize_tokens
from .spec import QuantSpec
from .triton_attention import _arch, _on, check_device

_MIN_BLOCK_D = 64
"""FP4 units contract 64 elements at a time."""


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int


# COMPILED ONLY, not run on such GPUs (tests/test_triton_inference_aot.py): FP4 units multiply, nothing spills. On sm_100 tiles of
# 64 queries fall back to BF16; on sm_120 four warps would spill. By architecture and `QuantSpec.pv`, for head dims up to 128.
_TILES = {
    (100, "nvfp4"): Tile(128, 128, 8, 2),
    (100, "bf16"): Tile(128, 64, 8, 2),
    (120, "nvfp4"): Tile(128, 64, 8, 2),
    (120, "bf16"): Tile(128, 32, 8, 2),
}
_EMULATED = Tile(64, 64, 8, 2)
_TRITON_FOR_SM_100 = (3, 9)
"""Triton 3.6 cannot compile two products with scales for sm_100; the versions between were not tried."""
NATIVE_HEAD_DIM = 128
"""FP4 units serve head dims up to this one; with 256 the accumulator alone fills the registers of sm_120."""


def why_not_native(arch: int, head_dim: int) -> str | None:
    """Why the products do not run on FP4 units, for an architecture (100 for sm_100) and a head dim; None if they do."""
    if arch < 100:
        return f"sm_{arch} has no FP4 units (sm_100 and sm_120 have)"
    if head_dim > NATIVE_HEAD_DIM:
        return f"head_dim {head_dim} is above {NATIVE_HEAD_DIM}"
    if arch < 120 and TRITON < _TRITON_FOR_SM_100:
        return f"Triton {TRITON[0]}.{TRITON[1]} cannot compile it for sm_{arch}; {'.'.join(map(str, _TRITON_FOR_SM_100))} can"
    return None


def choose(arch: int, head_dim: int, pv: str) -> Tile:
    """The tile for an architecture, a head dim and the format of P and V."""
    return _EMULATED if why_not_native(arch, head_dim) else _TILES[120 if arch >= 120 else 100, pv]


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    *,
    spec: QuantSpec,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, sections 3 and 4: O in the shape, strides and dtype of `query`, and LSE float32 [B, H, Lq].

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    check_device(query.device)
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    if not query.numel() or not keys:
        return out.zero_(), lse.fill_(-torch.inf)
    sides = Sequences(batch, heads, queries, queries), Sequences(batch, key_heads, keys, keys)
    allowed = allowed_keys(key_mask, sides[1])
    shift_dot = None
    if k_shift is not None:
        k_shift, shift_dot = k_shift.contiguous(), torch.empty_like(lse)
    arch = _arch(query.device)
    tile = choose(arch, head_dim, spec.pv)
    quantize = spec.pv == "nvfp4"
    with _on(query.device):
        q, k = (Codes.empty(side, head_dim, tokens=False, device=query.device) for side in sides)
        options = {"shift": k_shift, "rotate": spec.rotate, "four_over_six": spec.four_over_six, "operand": False}
        quantize_rows(query, sides[0], keys=False, dots=shift_dot, negate=scale < 0, codes=q, **options)
        quantize_rows(key, sides[1], keys=True, allowed=allowed, codes=k, **options)
        vf = None
        if quantize:
            vf = Codes.empty(sides[1], head_dim, tokens=True, device=query.device)
            quantize_tokens(value, sides[1], allowed=allowed, quantized=False, four_over_six=spec.four_over_six, codes=vf)
        inference_kernel[(batch * heads * -(-queries // tile.queries),)](
            *q, *k, *(vf or (None, None)), value, *(allowed or (None, None)), shift_dot, out, lse,
            *value.stride(), *out.stride(), heads, key_heads, queries, keys, sides[0].rows, sides[1].rows,
            reference.scale_of_quantized(abs(scale), head_dim, spec) * reference.LOG2_E, scale,
            HEAD_DIM=head_dim, BLOCK_D=max(_MIN_BLOCK_D, block_of(head_dim)), BLOCK_M=tile.queries, BLOCK_N=tile.keys,
            CAUSAL=causal, MASKED=key_mask is not None, QUANTIZE=quantize, SHIFTED=k_shift is not None,
            NATIVE=why_not_native(arch, head_dim) is None, CONVERT=arch >= 100,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse
