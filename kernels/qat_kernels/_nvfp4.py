"""NVFP4 in Triton: rounding for the attention kernels, and the kernels that quantize Q, K and V (docs/NUMERICS.md, 1, 2, 6).

The reference is nvfp4.py, and codes and scales are equal to its own bit for bit. Everything is float32 arithmetic: no
hardware conversion to FP4 or FP8 is needed, which sm_80 does not have and Triton's interpreter gets wrong.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .spec import E2M1_MAX, E4M3_MAX, GROUP_SIZE, HADAMARD_ENTRY, P_GLOBAL_SCALE, SCALE_MIN

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels; two of its conversions have to be avoided (`dot`, `narrow`)."""
GROUP = tl.constexpr(GROUP_SIZE)
P_GAIN = tl.constexpr(P_GLOBAL_SCALE)
_TOP = tl.constexpr(E2M1_MAX)
_SCALE_MIN, _SCALE_MAX = tl.constexpr(SCALE_MIN), tl.constexpr(E4M3_MAX)
_SCALE_MIN_NORMAL = tl.constexpr(2.0**-6)
_HADAMARD = tl.constexpr(HADAMARD_ENTRY)
_EXPONENT, _MAGNITUDE, _SIGN = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFFFF), tl.constexpr(-0x80000000)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32. The interpreter multiplies bfloat16 as integers; float32 holds the same values."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to the nearest `dtype`. The interpreter truncates to bfloat16, so its low bits are rounded away before."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def load_tile(ptrs, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile with zeros where `rows` or `columns` are False."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(ptrs, mask=rows[:, None] & columns[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(ptrs, mask=columns[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _power_of_two_below(x):
    """2^floor(log2 x) of a normal x > 0: the exponent field alone."""
    return (x.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def round_to_e4m3(x):
    """The nearest E4M3 value, ties to even, of x >= 0 clamped to [2^-9, 448]; NaN is lost (see `_round_groups`).

    Adding and subtracting 2^23 spacings leaves a float32 rounded to that spacing, which is an eighth of the power of two
    below the value.
    """
    x = tl.minimum(tl.maximum(x, _SCALE_MIN), _SCALE_MAX)
    anchor = tl.maximum(_power_of_two_below(x), _SCALE_MIN_NORMAL) * 1048576.0  # 2^20
    return (x + anchor) - anchor


@triton.jit
def round_to_e2m1(x):
    """The nearest E2M1 value, ties to the even code, of x >= 0, saturating at 6: as above, with half the power of two."""
    x = tl.minimum(x, _TOP)
    anchor = tl.maximum(_power_of_two_below(x), 1.0) * 4194304.0  # 2^22
    return (x + anchor) - anchor


@triton.jit
def quantize_weights(weights, AXIS: tl.constexpr):
    """phi of P~ with the keys along AXIS of a 2-D tile: code and scale, so that PF~ * 2688 = code * scale.

    Both have the shape of the tile cut into groups: AXIS becomes (groups, 16), and the scale has 1 in place of 16. The
    factor 2688 stays outside. Inputs are in [0, 1]; a NaN among them is not kept, because it reaches the row's sum too.
    """
    if AXIS == 0:
        groups = tl.reshape(weights, (weights.shape[0] // GROUP, GROUP, weights.shape[1]))
    else:
        groups = tl.reshape(weights, (weights.shape[0], weights.shape[1] // GROUP, GROUP))
    amax = tl.max(groups, AXIS + 1, keep_dims=True)
    scale = round_to_e4m3(amax * (P_GAIN / _TOP))
    return round_to_e2m1(groups * (P_GAIN / scale)), scale


@triton.jit
def _scale_for(amax, TOP: tl.constexpr):
    return round_to_e4m3(tl.div_rn(amax, amax * 0.0 + TOP))


@triton.jit
def _squared_error(magnitude, scale, exact, AXIS: tl.constexpr):
    error = magnitude * scale - exact
    return tl.sum(error * error, AXIS, keep_dims=True)


@triton.jit
def _round_groups(groups, AXIS: tl.constexpr, FOUR_OVER_SIX: tl.constexpr):
    """E2M1 magnitudes, E4M3 scales (AXIS has length 1) and whether a group is finite, as `nvfp4._round_groups` with g = 1."""
    exact = tl.abs(groups)
    # As integers, magnitudes have the same order, and unlike the maximum of floats this one keeps NaN.
    amax_bits = tl.max(groups.to(tl.int32, bitcast=True) & _MAGNITUDE, AXIS, keep_dims=True)
    finite = amax_bits < _EXPONENT
    amax = tl.where(finite, amax_bits, 0).to(tl.float32, bitcast=True)
    scale = _scale_for(amax, 6.0)
    # 1 % of bfloat16 inputs are exact ties: this division has to be rounded correctly.
    magnitude = round_to_e2m1(tl.div_rn(exact, scale))
    if FOUR_OVER_SIX:
        scale4 = _scale_for(amax, 4.0)
        magnitude4 = round_to_e2m1(tl.div_rn(exact, scale4))
        smaller = _squared_error(magnitude4, scale4, exact, AXIS) < _squared_error(magnitude, scale, exact, AXIS)
        scale, magnitude = tl.where(smaller, scale4, scale), tl.where(smaller, magnitude4, magnitude)
    return magnitude, scale, finite


@triton.jit
def _signed_values(groups, magnitude, scale, finite):
    """code * scale with the sign of the input, of zeros too; NaN in groups that are not finite."""
    value = tl.where(finite, magnitude * scale, float("nan"))
    sign = groups.to(tl.int32, bitcast=True) & _SIGN
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _codes(groups, magnitude, finite):
    """sign << 3 | E2M1 bits: {0, .5, 1, 1.5, 2 | 3, 4 | 6} lie on three lines, the lowest of which counts."""
    bits = tl.minimum(tl.minimum(magnitude * 2, magnitude + 2), magnitude / 2 + 4).to(tl.int32)
    sign = (groups.to(tl.int32, bitcast=True) >> 31) & 8
    return tl.where(finite, bits, 0) | sign


@triton.jit
def _scale_bits(scale, finite):
    """The byte of an E4M3 value: its exponent bias is 120 less than that of float32; below 2^-6 values count in 2^-9."""
    normal = (scale.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
    bits = tl.where(scale < _SCALE_MIN_NORMAL, (scale * 512.0).to(tl.int32), normal)
    return tl.where(finite, bits, 0x7F).to(tl.uint8)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """x [ROWS, SIZE] times the Sylvester-Hadamard matrix with entries +-1/8 (symmetric), as log2(SIZE) butterflies.

    Each takes the lowest bit of the column index and puts it back as the highest: after the last one, all columns are
    where they belong.
    """
    stages: tl.constexpr = tl.constexpr(SIZE.bit_length() - 1)
    for _ in tl.static_range(stages):
        even, odd = tl.split(tl.reshape(x, (ROWS, SIZE // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, SIZE))
    return x * _HADAMARD


@triton.jit
def _quantize_rows_kernel(
    x_ptr, shift_ptr, mask_ptr, values_ptr, codes_ptr, scales_ptr, shift_dot_ptr,
    stride_b, stride_h, stride_l, stride_d,
    heads, length, heads_per_shift,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    SUBTRACT_SHIFT: tl.constexpr, DOT_SHIFT: tl.constexpr, MASKED: tl.constexpr,
    ROTATE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Q or K, groups along the head dim: x [B, H, L, D] -> values [B, H, L, D], or codes [.., D / 2] and scales [.., D / 16]."""
    blocks = tl.cdiv(length, BLOCK_L)
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (row_of_heads // heads).to(tl.int64), (row_of_heads % heads).to(tl.int64)
    tokens = block * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_D)
    inside, valid = tokens < length, columns < HEAD_DIM
    present = inside
    if MASKED:  # excluded keys are never computed with, whatever they hold
        present = present & (tl.load(mask_ptr + batch * length + tokens, mask=inside, other=0) != 0)
    offsets = (
        batch * stride_b + head * stride_h + tokens.to(tl.int64)[:, None] * stride_l + columns.to(tl.int64)[None, :] * stride_d
    )
    x = tl.load(x_ptr + offsets, mask=present[:, None] & valid[None, :], other=0.0).to(tl.float32)

    rows = row_of_heads.to(tl.int64) * length + tokens  # of the outputs, which are contiguous
    if SUBTRACT_SHIFT or DOT_SHIFT:
        shift = tl.load(shift_ptr + (head // heads_per_shift) * HEAD_DIM + columns, mask=valid, other=0.0)
        if DOT_SHIFT:  # what the log-sum-exp lacks when the keys are shifted
            tl.store(shift_dot_ptr + rows, tl.sum(x * shift[None, :], 1), mask=inside)
        else:
            x = x - shift[None, :]
    if ROTATE:
        x = hadamard(x, BLOCK_L, BLOCK_D)

    groups = tl.reshape(x, (BLOCK_L, BLOCK_D // GROUP, GROUP))
    magnitude, scale, finite = _round_groups(groups, 2, FOUR_OVER_SIX)
    if PACKED:
        low, high = tl.split(tl.reshape(_codes(groups, magnitude, finite), (BLOCK_L, BLOCK_D // 2, 2)))
        bytes_ = tl.arange(0, BLOCK_D // 2)
        where = inside[:, None] & (bytes_ < HEAD_DIM // 2)[None, :]
        tl.store(codes_ptr + rows[:, None] * (HEAD_DIM // 2) + bytes_[None, :], (low | (high << 4)).to(tl.uint8), mask=where)
        group = tl.arange(0, BLOCK_D // GROUP)
        scale_bits = tl.reshape(_scale_bits(scale, finite), (BLOCK_L, BLOCK_D // GROUP))
        where = inside[:, None] & (group < HEAD_DIM // GROUP)[None, :]
        tl.store(scales_ptr + rows[:, None] * (HEAD_DIM // GROUP) + group[None, :], scale_bits, mask=where)
    else:
        values = tl.reshape(_signed_values(groups, magnitude, scale, finite), (BLOCK_L, BLOCK_D))
        where = inside[:, None] & valid[None, :]
        tl.store(
            values_ptr + rows[:, None] * HEAD_DIM + columns[None, :], narrow(values, values_ptr.dtype.element_ty), mask=where
        )


@triton.jit
def _quantize_tokens_kernel(
    x_ptr, mask_ptr, first_ptr, values_ptr, codes_ptr, scales_ptr,
    stride_b, stride_h, stride_l, stride_d,
    heads, length,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    MASKED: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """V, groups along the tokens from the first allowed one on.

    values [B, H, L, D] stay in their places (those before the first allowed token are not written); codes [B, H, L / 2, D]
    and scales [B, H, L / 16, D], both rounded up, start with the first allowed token.
    """
    blocks = tl.cdiv(length, BLOCK_L)
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    batch, head = (row_of_heads // heads).to(tl.int64), (row_of_heads % heads).to(tl.int64)
    first = 0
    if MASKED:
        first = tl.load(first_ptr + batch)
    tokens = first + block * BLOCK_L + tl.arange(0, BLOCK_L)
    columns = tl.arange(0, BLOCK_D)
    inside, valid = tokens < length, columns < HEAD_DIM
    present = inside
    if MASKED:
        present = present & (tl.load(mask_ptr + batch * length + tokens, mask=inside, other=0) != 0)
    offsets = (
        batch * stride_b + head * stride_h + tokens.to(tl.int64)[:, None] * stride_l + columns.to(tl.int64)[None, :] * stride_d
    )
    x = tl.load(x_ptr + offsets, mask=present[:, None] & valid[None, :], other=0.0).to(tl.float32)

    groups = tl.reshape(x, (BLOCK_L // GROUP, GROUP, BLOCK_D))
    magnitude, scale, finite = _round_groups(groups, 1, FOUR_OVER_SIX)
    if PACKED:
        codes = tl.reshape(_codes(groups, magnitude, finite), (BLOCK_L // 2, 2, BLOCK_D))
        low, high = tl.split(tl.permute(codes, (0, 2, 1)))
        pairs = block * (BLOCK_L // 2) + tl.arange(0, BLOCK_L // 2)
        pairs_of_head = (length + 1) // 2
        rows = row_of_heads.to(tl.int64) * pairs_of_head + pairs
        where = (pairs < pairs_of_head)[:, None] & valid[None, :]
        tl.store(codes_ptr + rows[:, None] * HEAD_DIM + columns[None, :], (low | (high << 4)).to(tl.uint8), mask=where)
        group = block * (BLOCK_L // GROUP) + tl.arange(0, BLOCK_L // GROUP)
        groups_of_head = tl.cdiv(length, GROUP)
        rows = row_of_heads.to(tl.int64) * groups_of_head + group
        where = (group < groups_of_head)[:, None] & valid[None, :]
        scale_bits = tl.reshape(_scale_bits(scale, finite), (BLOCK_L // GROUP, BLOCK_D))
        tl.store(scales_ptr + rows[:, None] * HEAD_DIM + columns[None, :], scale_bits, mask=where)
    else:
        values = tl.reshape(_signed_values(groups, magnitude, scale, finite), (BLOCK_L, BLOCK_D))
        rows = row_of_heads.to(tl.int64) * length + tokens
        where = inside[:, None] & valid[None, :]
        tl.store(
            values_ptr + rows[:, None] * HEAD_DIM + columns[None, :], narrow(values, values_ptr.dtype.element_ty), mask=where
        )


_ELEMENTS = 4096
"""Elements of a tile: 32 for each thread of four warps. Compiled, not yet measured."""


def block_of(head_dim: int) -> int:
    """The head dim rounded up to a power of two."""
    return 1 << (head_dim - 1).bit_length()


def quantize_rows(
    x: torch.Tensor,
    *,
    shift: torch.Tensor | None = None,
    shift_dot: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    rotate: bool = False,
    four_over_six: bool = False,
    packed: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Q or K [B, H, L, D] of any strides, quantized along the head dim.

    Args:
        shift: float32 [Hk, D], contiguous; subtracted, unless
        shift_dot: float32 [B, H, L] is given, which takes x . shift of each row instead (a query head reads its key head's).
        mask: uint8 [B, L], contiguous; rows where it is 0 are read as zeros.

    Returns:
        code * scale in the dtype of x, contiguous (16-bit dtypes hold it exactly); with `packed` codes uint8 [B, H, L, D / 2],
        two a byte, and scales float8_e4m3fn [B, H, L, D / 16].
    """
    batch, heads, length, head_dim = x.shape
    values, codes, scales = _outputs(
        x, packed, (batch, heads, length, head_dim // 2), (batch, heads, length, head_dim // GROUP_SIZE)
    )
    block_d = block_of(head_dim)
    block_l = max(16, _ELEMENTS // block_d)
    _quantize_rows_kernel[(batch * heads * -(-length // block_l),)](
        x, shift, mask, values, codes, None if scales is None else scales.view(torch.uint8), shift_dot,
        *x.stride(), heads, length, 1 if shift is None else heads // shift.shape[0],
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=block_l,
        SUBTRACT_SHIFT=shift is not None and shift_dot is None, DOT_SHIFT=shift_dot is not None, MASKED=mask is not None,
        ROTATE=rotate, FOUR_OVER_SIX=four_over_six, PACKED=packed,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return (codes, scales) if packed else values


def quantize_tokens(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    first: torch.Tensor | None = None,
    four_over_six: bool = False,
    packed: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """V [B, H, L, D] of any strides, quantized along the tokens.

    Args:
        mask, first: uint8 [B, L], contiguous, and int32 [B], the index of each sequence's first allowed token; both or none.
            Groups are counted from there.

    Returns:
        code * scale in the dtype of x, contiguous, undefined before `first`; with `packed` codes uint8 [B, H, L / 2, D], two
        a byte, and scales float8_e4m3fn [B, H, L / 16, D], both rounded up and counted from `first`.
    """
    batch, heads, length, head_dim = x.shape
    groups = -(-length // GROUP_SIZE)
    values, codes, scales = _outputs(x, packed, (batch, heads, -(-length // 2), head_dim), (batch, heads, groups, head_dim))
    block_d = block_of(head_dim)
    block_l = max(GROUP_SIZE, _ELEMENTS // block_d)
    _quantize_tokens_kernel[(batch * heads * -(-length // block_l),)](
        x, mask, first, values, codes, None if scales is None else scales.view(torch.uint8),
        *x.stride(), heads, length,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=block_l,
        MASKED=mask is not None, FOUR_OVER_SIX=four_over_six, PACKED=packed,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return (codes, scales) if packed else values


def _outputs(x: torch.Tensor, packed: bool, codes: tuple[int, ...], scales: tuple[int, ...]):
    if not packed:
        return x.new_empty(x.shape), None, None
    return None, x.new_empty(codes, dtype=torch.uint8), x.new_empty(scales, dtype=torch.float8_e4m3fn)
