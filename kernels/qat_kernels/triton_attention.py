"""The attention of docs/NUMERICS.md as Triton kernels: prepares the operands, chooses tiles and launches.

Takes what reference.py and packed.py take and returns the same, plus what its own backward reads. Needs an NVIDIA GPU from sm_80
on (or Triton's interpreter); imports triton through the modules whose names begin with an underscore.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch

from . import reference, tiles
from ._backward import grad_key_value_kernel, grad_query_kernel, prepare_kernel
from ._forward import attention_forward_kernel
from ._layout import PAD, Sequences, descriptors, order_of
from ._nvfp4 import INTERPRET
from ._quantize import Codes, Keys, allowed_keys, block_of, operand_dtype, quantize_rows, quantize_tokens, strides_of, unpack
from .packed import Packing, lse_shape
from .spec import GROUP_SIZE, QuantSpec

_MIN_ARCH = 80


def check_device(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run. Under Triton's interpreter they run everywhere."""
    if INTERPRET.value:
        return
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"attention: impl='triton': expected tensors on an NVIDIA GPU, got {device}; use impl='eager'")
    if _arch(device) < _MIN_ARCH:
        raise ValueError(f"attention: impl='triton': expected sm_{_MIN_ARCH} or later, got sm_{_arch(device)}; use impl='eager'")


class Problem(NamedTuple):
    """One call's sizes and options; what forward and backward have in common."""

    query: Sequences
    key: Sequences
    head_dim: int
    spec: QuantSpec
    causal: bool
    scale: float

    @classmethod
    def of(
        cls, query: torch.Size, key: torch.Size, packing: Packing | None, *, spec: QuantSpec, causal: bool, scale: float
    ) -> Problem:
        """From the shapes [B, H, L, D], or [total, H, D] of packed sequences."""
        lead = PAD - GROUP_SIZE if causal and spec.pv == "nvfp4" else 0
        if packing is None:
            (batch, heads, queries, head_dim), (_, key_heads, keys, _) = query, key
            sides = Sequences(batch, heads, queries, queries), Sequences(batch, key_heads, keys, keys, lead=lead)
        else:
            (queries, heads, head_dim), (keys, key_heads, _) = query, key
            count = packing.cu_seqlens_q.shape[0] - 1
            sides = (
                Sequences(count, heads, packing.max_seqlen_q, queries, packing.cu_seqlens_q),
                Sequences(count, key_heads, packing.max_seqlen_k, keys, packing.cu_seqlens_k, lead),
            )
        return cls(*sides, head_dim, spec, causal, scale)

    @property
    def empty(self) -> bool:
        return not (self.query.count * self.query.heads * self.query.length * self.key.length)

    @property
    def score_scale(self) -> float:
        """Of the scores of the quantized Q and K; its sign is in the operand of Q."""
        return reference.scale_of_quantized(abs(self.scale), self.head_dim, self.spec)

    @property
    def constants(self) -> dict:
        """What all attention kernels are compiled for."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_of(self.head_dim),
            "LEAD": self.key.lead,
            "CAUSAL": self.causal,
            "VARLEN": self.query.cu is not None,
            "enable_fp_fusion": True,
        }

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.query.heads, self.key.heads, self.query.length, self.key.length

    def code_shapes(self) -> list[tuple[int, int]]:
        """Of codes and scales of Q, K and, unless V itself is kept, V."""
        shapes = [*Codes.shapes(self.query, self.head_dim, tokens=False), *Codes.shapes(self.key, self.head_dim, tokens=False)]
        return shapes if reads_value(self.spec, self.causal) else [*shapes, *Codes.shapes(self.key, self.head_dim, tokens=True)]

    def code_bytes(self) -> int:
        return sum(rows * columns for rows, columns in self.code_shapes())

    def codes_in(self, codes: torch.Tensor) -> list[Codes]:
        """Views of Q, K and, unless V itself is kept, V."""
        shapes = self.code_shapes()
        views = [x.view(shape) for x, shape in zip(codes.split([a * b for a, b in shapes]), shapes, strict=True)]
        return [Codes(*views[i : i + 2]) for i in range(0, len(views), 2)]


class Forward(NamedTuple):
    """What a forward returns. All but `out` and `lse` are for the backward, and empty where there will be none."""

    out: torch.Tensor
    """O, in the shape, strides and dtype of Q."""
    twin: torch.Tensor
    """O', likewise; empty with BF16 PV too, where O serves."""
    lse: torch.Tensor
    """float32 [B, H, Lq], or [H, total] of packed sequences."""
    stats: torch.Tensor
    """float32 [2, rows of Q]: m and the base-2 log-sum-exp of the quantized scores; +inf in rows without a (quantized) key."""
    codes: torch.Tensor
    """uint8: the codes and scales of Q, K and, unless V itself is read again, V."""


def reads_value(spec: QuantSpec, causal: bool) -> bool:
    """Whether V is read as it is, so that the backward needs it: with BF16 PV, and where groups are kept."""
    return causal or spec.pv == "bf16"


def output_shapes(
    query: torch.Size, key: torch.Size, packing: Packing | None = None, *, spec: QuantSpec, causal: bool, with_gradient: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of `Forward.stats` and `Forward.codes`."""
    problem = Problem.of(query, key, packing, spec=spec, causal=causal, scale=1.0)
    if not with_gradient or problem.empty:
        return (0,), (0,)
    return (2, problem.query.all_rows), (problem.code_bytes(),)


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
    with_gradient: bool,
) -> Forward:
    """docs/NUMERICS.md, sections 3 and 4.

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    check_device(query.device)
    problem = Problem.of(query.shape, key.shape, packing, spec=spec, causal=causal, scale=scale)
    with_twin = with_gradient and spec.pv == "nvfp4"
    stats_shape, codes_shape = output_shapes(
        query.shape, key.shape, packing, spec=spec, causal=causal, with_gradient=with_gradient
    )
    # Packed sequences leave gaps between them, which no kernel writes or reads.
    new = query.new_empty if packing is None else query.new_zeros
    result = Forward(
        out=torch.empty_like(query),
        twin=torch.empty_like(query) if with_twin else query.new_empty(0),
        lse=query.new_empty(lse_shape(query.shape, packing), dtype=torch.float32),
        stats=new(stats_shape, dtype=torch.float32),
        codes=new(codes_shape, dtype=torch.uint8),
    )
    if problem.empty:
        result.out.zero_(), result.twin.zero_(), result.lse.fill_(-torch.inf)
        return result
    with _on(query.device):
        allowed = allowed_keys(key_mask, problem.key)
        tile = _tiles(query.device, problem).forward
        order = order_of(tile.keys)
        codes = problem.codes_in(result.codes) if with_gradient else []
        options = {"rotate": spec.rotate, "four_over_six": spec.four_over_six}
        shift_dot = None
        if k_shift is not None:
            k_shift, shift_dot = k_shift.contiguous(), torch.empty_like(result.lse)
        codes = codes + [None] * (3 - len(codes))
        operands = (
            quantize_rows(
                query, problem.query, keys=False, shift=k_shift, dots=shift_dot, negate=scale < 0, codes=codes[0], **options
            ),
            quantize_rows(key, problem.key, keys=True, order=order, allowed=allowed, shift=k_shift, codes=codes[1], **options),
            *_value_operands(value, problem, allowed, order, codes=codes[2]),
        )
        blocks = problem.query.blocks(tile.queries)
        lse_strides = result.lse.stride()[:2] if packing is None else (0, result.lse.stride(0))
        attention_forward_kernel[(problem.query.count * problem.query.heads * blocks,)](
            *descriptors(operands, (tile.queries, tile.keys, tile.keys, tile.keys)),
            *_key_pointers(allowed), shift_dot, problem.query.cu, problem.key.cu,
            result.out, result.twin, result.lse, result.stats,
            *strides_of(result.out), *lse_strides, _mask_stride(allowed),
            *problem.sizes, blocks, problem.query.rows, problem.key.rows, problem.query.all_rows,
            problem.score_scale * reference.LOG2_E, scale,
            **problem.constants, BLOCK_M=tile.queries, BLOCK_N=tile.keys, ORDER=order, MASKED=allowed is not None,
            QUANTIZE=spec.pv == "nvfp4", TWIN=with_twin, STATS=with_gradient, SHIFTED=k_shift is not None,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return result


def backward(
    grad_out: torch.Tensor,
    value: torch.Tensor | None,
    twin: torch.Tensor,
    stats: torch.Tensor,
    codes: torch.Tensor,
    key_mask: torch.Tensor | None,
    packing: Packing | None = None,
    *,
    key_shape: torch.Size,
    spec: QuantSpec,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, section 5: dQ, dK, dV, contiguous, in the dtype of dO.

    Args:
        value: V where it is read as it is (`reads_value`), else None.
        twin: O', or O with BF16 PV.
        stats, codes: of `forward`.
    """
    problem = Problem.of(grad_out.shape, key_shape, packing, spec=spec, causal=causal, scale=scale)
    # With a mask, keys that no query may see are not visited.
    new = torch.empty if key_mask is None else torch.zeros
    dtype, device = grad_out.dtype, grad_out.device
    grad_query = torch.empty(grad_out.shape, dtype=dtype, device=device)
    grad_key, grad_value = (new(key_shape, dtype=dtype, device=device) for _ in range(2))
    if problem.empty:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    side = problem.query
    operand = operand_dtype(dtype)
    kept = problem.key.lead > 0
    normed, grad_operand = (
        grad_out.new_empty((side.all_rows, block_of(problem.head_dim)), dtype=operand) if wanted else None
        for wanted in (True, kept)
    )
    delta = torch.empty_like(stats)
    with _on(device):
        allowed = allowed_keys(key_mask, problem.key)
        query_codes, key_codes, *value_codes = problem.codes_in(codes)
        operands = [unpack(query_codes, operand, tokens=False), unpack(key_codes, operand, tokens=False)]
        if reads_value(spec, causal):
            operands += _value_operands(value, problem, allowed)
        else:
            operands += [unpack(*value_codes, operand, tokens=True), None]
        constants = {**problem.constants, "MASKED": allowed is not None, "ROTATE": spec.rotate}
        chosen = _tiles(device, problem)
        rows = max(16, 2048 // block_of(problem.head_dim))
        blocks = side.blocks(rows)
        prepare_kernel[(side.count * side.heads * blocks,)](
            grad_out, twin, stats, side.cu, normed, grad_operand, delta, *strides_of(grad_out), *strides_of(twin),
            side.heads, side.length, blocks, side.rows, side.all_rows,
            HEAD_DIM=problem.head_dim, BLOCK_D=block_of(problem.head_dim), BLOCK_M=rows, VARLEN=packing is not None,
            PLAIN=kept, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        pointers = (*_key_pointers(allowed), side.cu, problem.key.cu)

        def numbers(out: torch.Tensor, blocks: int, scale: float) -> tuple:
            sizes = (*problem.sizes, blocks, side.rows, problem.key.rows, side.all_rows)
            return (*strides_of(out)[:3], _mask_stride(allowed), *sizes, problem.score_scale * reference.LOG2_E, scale)

        tile = chosen.grad_query
        blocks = side.blocks(tile.queries)
        grad_query_kernel[(side.count * side.heads * blocks,)](
            *descriptors(operands, (tile.queries, tile.keys, tile.keys, tile.keys)), *pointers,
            grad_out, delta, stats, grad_query,
            *strides_of(grad_out), *numbers(grad_query, blocks, math.copysign(problem.score_scale, scale)),
            **constants, BLOCK_M=tile.queries, BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = chosen.grad_key_value
        # Where groups are kept, the first block ends with the sink group, which ends PAD slots.
        blocks = problem.key.blocks(tile.keys) - (PAD // tile.keys - 1 if problem.key.lead else 0)
        query, key, value, kept_value = operands
        operands = (query, key, value, normed, kept_value, grad_operand)
        shapes = (tile.queries, tile.keys, tile.keys, tile.queries, tile.keys, tile.queries)
        grad_key_value_kernel[(problem.key.count * problem.key.heads * blocks,)](
            *descriptors(operands, shapes), *pointers, delta, stats, grad_key, grad_value,
            *numbers(grad_key, blocks, problem.score_scale), **constants, QUANTIZE=spec.pv == "nvfp4",
            BLOCK_M=tile.queries, BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


def _value_operands(
    value: torch.Tensor, problem: Problem, allowed: Keys | None, order: int = 0, *, codes: Codes | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """V as the spec has it, and where groups are kept V as it is."""
    quantized = problem.spec.pv == "nvfp4"
    options = {"quantized": quantized, "plain": not quantized or problem.key.lead > 0, "order": order, "codes": codes}
    value, *kept = quantize_tokens(value, problem.key, allowed=allowed, four_over_six=problem.spec.four_over_six, **options)
    return value, kept[0] if kept else None


def _key_pointers(allowed: Keys | None) -> tuple:
    return (None, None) if allowed is None else allowed


def _mask_stride(allowed: Keys | None) -> int:
    return 0 if allowed is None else allowed.mask.stride(0)


def _tiles(device: torch.device, problem: Problem) -> tiles.Tiles:
    return tiles.choose(_arch(device), problem.head_dim, problem.causal)


@lru_cache
def _arch(device: torch.device) -> int:
    """80 for sm_80, and so on. On a CPU, where only the interpreter runs, tiles are those of the smallest architecture."""
    if device.type != "cuda":
        return _MIN_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
