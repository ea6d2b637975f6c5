"""Attention without gradients on FP4 matrix units: prepares packed operands, chooses tiles and launches _inference.py."""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import reference
from ._inference import TRITON, inference_kernel
from ._quantize import Codes, allowed_keys, block_of, quantize_rows, quantize_tokens, strides_of
from .packed import Packing, lse_shape
from .spec import QuantSpec
from .triton_attention import Problem, _arch, _key_pointers, _mask_stride, _on, check_device

_MIN_BLOCK_D = 64
"""FP4 units contract 64 elements at a time."""


class Tile(NamedTuple):
    queries: int
    keys: int
    """A divisor of 128."""
    warps: int
    stages: int
    order: int
    """How rows of K are permuted (_layout.py), so that P~ is quantized and multiplied by the thread that holds it."""


# COMPILED ONLY, not run on such GPUs (tests/test_triton_inference_aot.py): FP4 units multiply, nothing spills. On sm_100 tiles of
# 64 queries fall back to BF16, and a thread reads whole groups from tensor memory; on sm_120 an operand of the FP4 units
# has half a group in a thread. By architecture and `QuantSpec.pv`, for head dims up to 128.
_TILES = {
    (100, "nvfp4"): Tile(128, 128, 8, 2, 0),
    (100, "bf16"): Tile(128, 64, 8, 2, 0),
    (120, "nvfp4"): Tile(128, 128, 8, 2, 32),
    (120, "bf16"): Tile(128, 32, 8, 2, 32),
}
_EMULATED = Tile(64, 64, 8, 2, 64)
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
    packing: Packing | None = None,
    *,
    spec: QuantSpec,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, sections 3 and 4: O in the shape, strides and dtype of `query`, and LSE float32 [B, H, Lq] or [H, total].

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    check_device(query.device)
    problem = Problem.of(query.shape, key.shape, packing, spec=spec, causal=causal, scale=scale)
    head_dim = problem.head_dim
    out = torch.empty_like(query)
    lse = query.new_empty(lse_shape(query.shape, packing), dtype=torch.float32)
    if problem.empty:
        return out.zero_(), lse.fill_(-torch.inf)
    arch = _arch(query.device)
    tile = choose(arch, head_dim, spec.pv)
    shift_dot = None
    if k_shift is not None:
        k_shift, shift_dot = k_shift.contiguous(), torch.empty_like(lse)
    with _on(query.device):
        allowed = allowed_keys(key_mask, problem.key)
        q, k = (Codes.empty(side, head_dim, tokens=False, device=query.device) for side in (problem.query, problem.key))
        options = {"shift": k_shift, "rotate": spec.rotate, "four_over_six": spec.four_over_six, "operand": False}
        quantize_rows(query, problem.query, keys=False, dots=shift_dot, negate=scale < 0, codes=q, **options)
        quantize_rows(key, problem.key, keys=True, order=tile.order, allowed=allowed, codes=k, **options)
        vf = None
        if spec.pv == "nvfp4":
            vf = Codes.empty(problem.key, head_dim, tokens=True, columns=True, device=query.device)
            options = {"quantized": False, "four_over_six": spec.four_over_six, "columns": True}
            quantize_tokens(value, problem.key, allowed=allowed, codes=vf, **options)
        blocks = problem.query.blocks(tile.queries)
        lse_strides = lse.stride()[:2] if packing is None else (0, lse.stride(0))
        constants = problem.constants | {"BLOCK_D": max(_MIN_BLOCK_D, block_of(head_dim))}
        inference_kernel[(problem.query.count * problem.query.heads * blocks,)](
            *q, *k, *(vf or (None, None)), value, *_key_pointers(allowed), shift_dot, problem.query.cu, problem.key.cu, out, lse,
            *strides_of(value), *strides_of(out), *lse_strides, _mask_stride(allowed),
            *problem.sizes, blocks, problem.query.rows, problem.key.rows, problem.score_scale * reference.LOG2_E, scale,
            **constants, BLOCK_M=tile.queries, BLOCK_N=tile.keys, ORDER=tile.order, MASKED=allowed is not None,
            QUANTIZE=vf is not None, SHIFTED=k_shift is not None,
            NATIVE=why_not_native(arch, head_dim) is None, CONVERT=arch >= 100,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse
