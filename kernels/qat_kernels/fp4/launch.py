"""Attention without gradients on FP4 matrix units: prepares packed operands, chooses tiles and launches kernel.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from triton import next_power_of_2

from qat_kernels.mask import Mask
from qat_kernels.spec import QuantSpec
from qat_kernels.triton.device import TRITON, arch_of, check_device, on_device
from qat_kernels.triton.operands import (
    PLANS,
    Codes,
    Given,
    Layout,
    Sequences,
    allowed_keys,
    given_tensors,
    head_strides,
    rows_job,
    strides_of,
    together,
    tokens_job,
)
from qat_kernels.triton.precompiled import Launch, Pointer, pointer
from qat_kernels.triton.problem import PackedSizes, Problem, is_empty
from qat_kernels.varlen import Packing, lse_shape

from .kernel import inference_kernel

_MIN_BLOCK_D = 64


class Tile(NamedTuple):
    block_m: int
    """Queries."""
    block_n: int
    """Keys: a divisor of 128."""
    num_warps: int
    num_stages: int
    order: int
    """How rows of K are permuted (triton/layout.py), so that P~ is quantized and multiplied by the thread that holds it."""


# COMPILED ONLY, not run on such GPUs (tests/kernels/fp4/test_triton_inference_aot.py): FP4 units multiply, nothing spills.
# On sm_100 tiles of 64 queries fall back to BF16, and a thread reads whole groups from tensor memory; on sm_120 an operand of the
# FP4 units has half a group in a thread. By architecture and `QuantSpec.quantizes_pv`, for head dims up to 128.
_TILES: dict[tuple[int, bool], Tile] = {
    (100, True): Tile(128, 128, 8, 2, 0),
    (100, False): Tile(128, 64, 8, 2, 0),
    (120, True): Tile(128, 128, 8, 2, 32),
    (120, False): Tile(128, 32, 8, 2, 32),
}
_EMULATED = Tile(64, 64, 8, 2, 64)
NATIVE_HEAD_DIM = 128
"""FP4 units serve head dims up to this one; with 256 the accumulator alone fills the registers of sm_120."""


class Compiled(NamedTuple):
    """What the machine code of the kernel depends on most."""

    triton: tuple[int, int]
    arch: int
    block_d: int
    """The head dim, padded to a power of two."""
    quantize_pv: bool


def _compiled(triton: tuple[int, int], *archs: int) -> set[Compiled]:
    return {Compiled(triton, arch, block_d, pv) for arch in archs for block_d in (64, 128) for pv in (True, False)}


ON_FP4_UNITS = _compiled((3, 6), 120) | _compiled((3, 7), 120) | _compiled((3, 8), 120, 121)
ON_FP4_UNITS |= _compiled((3, 9), 100, 103, 120, 121)
"""Whose machine code was inspected and multiplies on FP4 units as it should; all else is emulated. What 3.6 to 3.8 lack of the
last line stops their compiler. tests/kernels/fp4/test_triton_inference_aot.py holds the table to the Triton that is installed."""


def why_not_native(arch: int, head_dim: int, quantize_pv: bool) -> str | None:
    """Why the products do not run on FP4 units, for an architecture (100 for sm_100) and a problem; None if they do."""
    if arch < 100:
        return f"sm_{arch} has no FP4 units (sm_100 and sm_120 have)"
    if head_dim > NATIVE_HEAD_DIM:
        return f"head_dim {head_dim} is above {NATIVE_HEAD_DIM}"
    known = [each.triton for each in sorted(ON_FP4_UNITS) if each[1:] == (arch, padded_head_dim(head_dim), quantize_pv)]
    if TRITON in known:
        return None
    versions = ", ".join(f"{major}.{minor}" for major, minor in known)
    return (
        f"Triton {TRITON[0]}.{TRITON[1]} is not known to compile it well for sm_{arch}, head_dim {head_dim}, "
        f"{'P and V quantized' if quantize_pv else 'P and V in BF16'} "
        f"(known: {versions or 'no version'})"
    )


def padded_head_dim(head_dim: int) -> int:
    """Columns of the kernel's tiles: FP4 units contract 64 elements at a time."""
    return max(_MIN_BLOCK_D, next_power_of_2(head_dim))


def choose(arch: int, head_dim: int, quantize_pv: bool) -> Tile:
    """The tile for an architecture, a head dim and the format of P and V."""
    return _EMULATED if why_not_native(arch, head_dim, quantize_pv) else _TILES[120 if arch >= 120 else 100, quantize_pv]


class _Plan(NamedTuple):
    """All of a forward but its tensors."""

    queries: Sequences
    keys: Sequences
    prepare: Launch
    """Quantizes Q, K and, if P and V are quantized, V."""
    attend: Launch


@lru_cache(PLANS)
def _plan(
    device: torch.device,
    arch: int,
    tile: Tile,
    native: bool,
    query: Layout,
    key: Layout,
    value: Layout,
    out_strides: tuple[int, ...],
    packed: PackedSizes | None,
    given: Given,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
) -> _Plan:
    problem = Problem.of(query.shape, key.shape, packed, spec=spec, mask=mask, scale=scale, key_bias=given.q_shift)
    queries, keys, formats = problem.query, problem.key, spec.formats
    num_blocks = queries.blocks(tile.block_m)
    uint8, float32 = Pointer(torch.uint8), Pointer(torch.float32)
    cu_seqlens = given.pointer(torch.int32, packed is not None)
    attend = Launch.of(
        inference_kernel,
        (queries.batch * queries.num_heads * num_blocks,),
        [
            *[uint8] * 4, *[uint8 if spec.quantizes_pv else None] * 2, value.pointer, *given.key_mask_pointers(),
            float32 if given.k_shift else None, cu_seqlens, cu_seqlens, float32 if given.q_shift else None,
            Pointer(value.dtype), float32,
        ],
        [
            *value.strides, *out_strides, *head_strides(queries), keys.rows if given.key_mask else 0,
            *problem.sizes, num_blocks, queries.rows, keys.rows, problem.softmax_scale_log2, scale,
        ],
        {
            **problem.constants, "BLOCK_D": padded_head_dim(problem.head_dim), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
            "ORDER": tile.order, "HAS_KEY_MASK": given.key_mask, "HAS_K_SHIFT": given.k_shift, "NATIVE": native,
            "HW_CONVERT": arch >= 100,
        },
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return _Plan(
        queries, keys,
        together(
            rows_job(
                query, queries, given, formats.query, is_k=False, negate=scale < 0, rotate=spec.rotate, codes=True,
                heads_per_shift=queries.num_heads // keys.num_heads if given.k_shift or given.q_shift else 1,
            ),
            rows_job(
                key, keys, given, formats.key, is_k=True, order=tile.order, negate=scale < 0, rotate=spec.rotate, codes=True
            ),
            *([tokens_job(value, keys, given, formats.value, codes=True, col_major=True)] if spec.quantizes_pv else []),
        ),
        attend,
    )  # fmt: skip


Outputs = tuple[torch.Tensor, torch.Tensor]


def new_outputs(query: torch.Tensor, packing: Packing | None) -> Outputs:
    """Memory for O and LSE."""
    return torch.empty_like(query), query.new_empty(lse_shape(query.shape, packing), dtype=torch.float32)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    packing: Packing | None = None,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    q_shift: torch.Tensor | None = None,
    allocate: Callable[[torch.Tensor, Packing | None], Outputs] = new_outputs,
    launched: Callable[[Any], object] | None = None,
) -> Outputs:
    """docs/NUMERICS.md, sections 3 and 4: O in the shape, strides and dtype of `query`, and LSE float32 [B, H, Lq] or [H, total].

    Args:
        mask: causal or not; the kernel computes no other one.
        allocate, launched: for the self-check, which guards the memory of the outputs and looks at the compiled kernel.

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    device, head_dim, packed = query.device, query.shape[-1], PackedSizes.of(packing)
    check_device(device)
    out, lse = allocate(query, packing)
    if is_empty(query.shape, key.shape, packed):
        return out.zero_(), lse.fill_(-torch.inf)
    with on_device(device):
        given, k_shift, q_shift, *_ = given_tensors(key_mask, k_shift, q_shift, packing, None, None)
        arch = arch_of(device)
        plan = _plan(
            device, arch, choose(arch, head_dim, spec.quantizes_pv), why_not_native(arch, head_dim, spec.quantizes_pv) is None,
            Layout.of(query), Layout.of(key), Layout.of(value), strides_of(out), packed, given, spec, mask, scale,
        )  # fmt: skip
        q, k = (Codes.empty(side, head_dim, along_tokens=False, device=device) for side in (plan.queries, plan.keys))
        q_dot_k_shift = None if k_shift is None else torch.empty_like(lse)
        key_bias = None if q_shift is None else lse.new_empty(plan.keys.all_rows)
        key_mask, leftpad = allowed_keys(key_mask, plan.keys)
        v: tuple[torch.Tensor | None, ...] = (None, None)
        if spec.quantizes_pv:
            v = Codes.empty(plan.keys, head_dim, along_tokens=True, col_major=True, device=device)
        cu_q, cu_k = (None, None) if packing is None else map(pointer, packing[:2])
        at_mask, at_leftpad, at_shift, at_products = map(pointer, (key_mask, leftpad, k_shift, q_dot_k_shift))
        at_q_shift, at_bias = map(pointer, (q_shift, key_bias))
        at_q, at_k, at_v = (tuple(map(pointer, codes)) for codes in (q, k, v))
        plan.prepare((
            (pointer(query), at_shift, at_q_shift, None, None, cu_q, None, *at_q, at_products, None),
            (pointer(key), at_shift, at_q_shift, at_mask, at_leftpad, cu_k, None, *at_k, None, at_bias),
            *([(pointer(value), at_mask, at_leftpad, cu_k, None, None, *at_v)] if spec.quantizes_pv else []),
        ))  # fmt: skip
        kernel = plan.attend(
            *at_q, *at_k, *at_v, pointer(value), at_mask, at_leftpad, at_products, cu_q, cu_k, at_bias, pointer(out), pointer(lse)
        )
    if launched is not None:
        launched(kernel)
    return out, lse
