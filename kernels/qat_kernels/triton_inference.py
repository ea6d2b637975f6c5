"""Attention without gradients on FP4 matrix units: prepares packed operands, chooses tiles and launches _inference.py."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from . import reference
from ._inference import TRITON, inference_kernel
from ._nvfp4 import block_of, quantize_rows, quantize_tokens
from .spec import QuantSpec
from .triton_attention import _arch, _near, _on, check_device

LOG2_E = math.log2(math.e)
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
    value = _near(value)
    mask = first = shift_dot = None
    if key_mask is not None:
        mask = key_mask.contiguous().view(torch.uint8)
        first = mask.argmax(1).to(torch.int32)
    if k_shift is not None:
        k_shift, shift_dot = k_shift.contiguous(), torch.empty_like(lse)
    arch = _arch(query.device)
    tile = choose(arch, head_dim, spec.pv)
    with _on(query.device):
        options = {"rotate": spec.rotate, "four_over_six": spec.four_over_six, "packed": True}
        q, q_scale = quantize_rows(query, shift=k_shift, shift_dot=shift_dot, **options)
        k, k_scale = quantize_rows(key, shift=k_shift, mask=mask, **options)
        vf = vf_scale = None
        if spec.pv == "nvfp4":
            vf, vf_scale = quantize_tokens(value, mask=mask, first=first, four_over_six=spec.four_over_six, packed=True)
        inference_kernel[(batch * heads * -(-queries // tile.queries),)](
            q, _bytes(q_scale), k, _bytes(k_scale), vf, _bytes(vf_scale), value, mask, first, shift_dot, out, lse,
            *value.stride(), *out.stride(), heads, key_heads, queries, keys,
            reference.scale_of_quantized(scale, head_dim, spec) * LOG2_E, scale,
            HEAD_DIM=head_dim, BLOCK_D=max(_MIN_BLOCK_D, block_of(head_dim)), BLOCK_M=tile.queries, BLOCK_N=tile.keys,
            CAUSAL=causal, MASKED=key_mask is not None, QUANTIZE=spec.pv == "nvfp4", SHIFTED=k_shift is not None,
            NATIVE=why_not_native(arch, head_dim) is None, CONVERT=arch >= 100,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _bytes(scales: torch.Tensor | None) -> torch.Tensor | None:
    return None if scales is None else scales.view(torch.uint8)
