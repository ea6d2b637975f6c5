"""The kernels that quantize Q, K and V: into operands of the attention kernels (_layout.py), into 4.5 bits a value, and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._layout import PAD, Sequences, first_row, row_of, sequence
from ._nvfp4 import (
    GROUP,
    INTERPRET,
    codes_of,
    hadamard,
    narrow,
    round_groups,
    scale_bits,
    scale_of,
    signed_values,
    value_of,
)
from .spec import GROUP_SIZE

_PAD = tl.constexpr(PAD)


@triton.jit
def _load_slots(
    x_ptr, mask_ptr, first_ptr, cu_ptr, stride_b, stride_h, stride_l, stride_d, mask_stride, heads, length, blocks, rows,
    columns, HEAD_DIM: tl.constexpr, BLOCK_L: tl.constexpr, LEAD: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The BLOCK_L slots of this program: the values of these columns in float32, zero for what is no allowed token, which
    slots are allowed, sequence and head, the token of each slot, the first row of the head, the slots, and whether to stop."""
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    index, head = row_of_heads // heads, row_of_heads % heads
    start, length = sequence(cu_ptr, index, length, VARLEN)
    first = 0
    if MASKED:
        first = tl.load(first_ptr + index)
    slots = block * BLOCK_L + tl.arange(0, BLOCK_L)
    key = slots - LEAD
    present = (key >= 0) & (key < length - first)
    if MASKED:  # excluded keys are never computed with, whatever they hold
        present = present & (tl.load(mask_ptr + index.to(tl.int64) * mask_stride + slots) != 0)
    token = start + first + key
    columns = columns.to(tl.int64)
    x_ptr += index.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    where = present[:, None] & (columns < HEAD_DIM)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64)[:, None] * stride_l + columns[None, :] * stride_d, mask=where, other=0.0)
    row = first_row(index, head, heads, rows, start, LEAD, VARLEN).to(tl.int64)
    behind = block * BLOCK_L >= tl.cdiv(length - first + LEAD, _PAD) * _PAD
    return x.to(tl.float32), present, index, head, token, row, slots, behind


@triton.jit
def _store_rows(ptr, rows, columns, values, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """values into these columns of rows of WIDTH elements; BOUNDED: some columns are beyond them."""
    if BOUNDED:
        tl.store(ptr + rows[:, None] * WIDTH + columns[None, :], values, mask=(columns < WIDTH)[None, :])
    else:
        tl.store(ptr + rows[:, None] * WIDTH + columns[None, :], values)


@triton.jit
def _store_columns(ptr, rows, columns, values, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, BOUNDED: tl.constexpr):
    """As `_store_rows`, but every HEIGHT rows lie by columns: WIDTH columns of HEIGHT elements."""
    ptrs = ptr + (rows // HEIGHT * (WIDTH * HEIGHT) + rows % HEIGHT)[:, None] + columns[None, :] * HEIGHT
    if BOUNDED:
        tl.store(ptrs, values, mask=(columns < WIDTH)[None, :])
    else:
        tl.store(ptrs, values)


@triton.jit
def _quantize_rows_kernel(
    x_ptr, shift_ptr, mask_ptr, first_ptr, cu_ptr, operand_ptr, codes_ptr, scales_ptr, dots_ptr,
    stride_b, stride_h, stride_l, stride_d, mask_stride, dots_stride_b, dots_stride_h,
    heads, length, blocks, rows, heads_per_shift, sign,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, LEAD: tl.constexpr, ORDER: tl.constexpr,
    KEYS: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr,
    ROTATE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, OPERAND: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """K (KEYS) minus its shift, or Q times `sign`, quantized along the head dim. For Q, dots takes the product with the shift."""
    columns = tl.arange(0, BLOCK_D)
    x, present, index, head, token, row, slots, behind = _load_slots(
        x_ptr, mask_ptr, first_ptr, cu_ptr, stride_b, stride_h, stride_l, stride_d, mask_stride, heads, length, blocks, rows,
        columns, HEAD_DIM, BLOCK_L, LEAD, MASKED, VARLEN,
    )  # fmt: skip
    if behind:
        return
    if SHIFTED:
        shift = tl.load(shift_ptr + (head // heads_per_shift) * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        if KEYS:
            x = tl.where(present[:, None], x - shift[None, :], 0.0)
        else:  # what the log-sum-exp lacks when the keys are shifted
            dots_ptr += index.to(tl.int64) * dots_stride_b + head.to(tl.int64) * dots_stride_h
            tl.store(dots_ptr + token, tl.sum(x * shift[None, :], 1), mask=present)
    if not KEYS:
        x = x * sign
    if ROTATE:
        x = hadamard(x, BLOCK_L, BLOCK_D)
    groups = tl.reshape(x, (BLOCK_L, BLOCK_D // GROUP, GROUP))
    magnitude, scale, finite = round_groups(groups, 2, FOUR_OVER_SIX)
    ordered = row + row_of(slots, ORDER)
    if CODES:
        where = row + slots if OPERAND else ordered
        low, high = tl.split(tl.reshape(codes_of(groups, magnitude, finite), (BLOCK_L, BLOCK_D // 2, 2)))
        pairs, group = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // GROUP)
        bounded: tl.constexpr = HEAD_DIM != BLOCK_D
        _store_rows(codes_ptr, where, pairs, (low | (high << 4)).to(tl.uint8), HEAD_DIM // 2, bounded)
        bits = tl.reshape(scale_bits(scale, finite), (BLOCK_L, BLOCK_D // GROUP))
        _store_rows(scales_ptr, where, group, bits, HEAD_DIM // GROUP, bounded)
    if OPERAND:
        values = tl.reshape(signed_values(groups, magnitude, scale, finite), (BLOCK_L, BLOCK_D))
        _store_rows(operand_ptr, ordered, columns, narrow(values, operand_ptr.dtype.element_ty), BLOCK_D, False)


@triton.jit
def _quantize_tokens_kernel(
    x_ptr, mask_ptr, first_ptr, cu_ptr, quantized_ptr, plain_ptr, codes_ptr, scales_ptr,
    stride_b, stride_h, stride_l, stride_d, mask_stride, heads, length, blocks, rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, LEAD: tl.constexpr,
    MASKED: tl.constexpr, VARLEN: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, ORDER: tl.constexpr,
    QUANTIZED: tl.constexpr, PLAIN: tl.constexpr, CODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """V, quantized along the tokens from the first allowed one on, and as it is: BLOCK_C columns of BLOCK_L slots."""
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x, _, _, _, _, row, slots, behind = _load_slots(
        x_ptr, mask_ptr, first_ptr, cu_ptr, stride_b, stride_h, stride_l, stride_d, mask_stride, heads, length, blocks, rows,
        columns, HEAD_DIM, BLOCK_L, LEAD, MASKED, VARLEN,
    )  # fmt: skip
    if behind:
        return
    where = row + row_of(slots, ORDER)
    if PLAIN:
        _store_rows(plain_ptr, where, columns, narrow(x, plain_ptr.dtype.element_ty), BLOCK_D, False)
    if QUANTIZED or CODES:
        groups = tl.reshape(x, (BLOCK_L // GROUP, GROUP, BLOCK_C))
        magnitude, scale, finite = round_groups(groups, 1, FOUR_OVER_SIX)
        if QUANTIZED:
            values = tl.reshape(signed_values(groups, magnitude, scale, finite), (BLOCK_L, BLOCK_C))
            _store_rows(quantized_ptr, where, columns, narrow(values, quantized_ptr.dtype.element_ty), BLOCK_D, False)
        if CODES:
            first_slot = row + tl.min(slots, 0)
            pairs = first_slot // 2 + tl.arange(0, BLOCK_L // 2)
            group = first_slot // GROUP + tl.arange(0, BLOCK_L // GROUP)
            codes = tl.reshape(codes_of(groups, magnitude, finite), (BLOCK_L // 2, 2, BLOCK_C))
            low, high = tl.split(tl.permute(codes, (0, 2, 1)))
            codes = (low | (high << 4)).to(tl.uint8)
            bits = tl.reshape(scale_bits(scale, finite), (BLOCK_L // GROUP, BLOCK_C))
            if COLUMNS:
                _store_columns(codes_ptr, pairs, columns, codes, HEAD_DIM, _PAD // 2, HEAD_DIM != BLOCK_D)
                _store_columns(scales_ptr, group, columns, bits, HEAD_DIM, _PAD // GROUP, HEAD_DIM != BLOCK_D)
            else:
                _store_rows(codes_ptr, pairs, columns, codes, HEAD_DIM, HEAD_DIM != BLOCK_D)
                _store_rows(scales_ptr, group, columns, bits, HEAD_DIM, HEAD_DIM != BLOCK_D)


@triton.jit
def _unpack_kernel(
    codes_ptr, scales_ptr, operand_ptr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Codes and scales into an operand: groups along the tokens (TOKENS) or along the head dim."""
    first_slot = tl.program_id(0).to(tl.int64) * BLOCK_L
    slots, columns = first_slot + tl.arange(0, BLOCK_L), tl.arange(0, BLOCK_D)
    if TOKENS:
        valid = (columns < HEAD_DIM)[None, :]
        pairs = first_slot // 2 + tl.arange(0, BLOCK_L // 2)
        codes = tl.load(codes_ptr + pairs[:, None] * HEAD_DIM + columns[None, :], mask=valid, other=0).to(tl.int32)
        codes = tl.reshape(tl.permute(tl.join(codes & 15, codes >> 4), (0, 2, 1)), (BLOCK_L // GROUP, GROUP, BLOCK_D))
        group = first_slot // GROUP + tl.arange(0, BLOCK_L // GROUP)
        scales = tl.load(scales_ptr + group[:, None] * HEAD_DIM + columns[None, :], mask=valid, other=0)
        values = value_of(codes) * scale_of(scales)[:, None, :]
    else:
        pairs, group = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // GROUP)
        valid = (pairs < HEAD_DIM // 2)[None, :]
        codes = tl.load(codes_ptr + slots[:, None] * (HEAD_DIM // 2) + pairs[None, :], mask=valid, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(codes & 15, codes >> 4), (BLOCK_L, BLOCK_D // GROUP, GROUP))
        valid = (group < HEAD_DIM // GROUP)[None, :]
        scales = tl.load(scales_ptr + slots[:, None] * (HEAD_DIM // GROUP) + group[None, :], mask=valid, other=0)
        values = value_of(codes) * scale_of(scales)[:, :, None]
    values = narrow(tl.reshape(values, (BLOCK_L, BLOCK_D)), operand_ptr.dtype.element_ty)
    _store_rows(operand_ptr, slots, columns, values, BLOCK_D, False)


class Codes(NamedTuple):
    """A tensor in 4.5 bits a value."""

    codes: torch.Tensor
    """uint8, two codes a byte: a row of D / 2 bytes for each slot; for V a row of D bytes for every two of them."""
    scales: torch.Tensor
    """uint8, the bits of E4M3: a row of D / 16 for each slot; for V a row of D for every 16 of them."""

    @staticmethod
    def shapes(
        sequences: Sequences, head_dim: int, *, tokens: bool, columns: bool = False
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of codes and scales, whose groups lie along the tokens (V) or along the head dim (Q, K).

        With `columns` those of V have a row for each of the D columns of every PAD slots, as FP4 units read it.
        """
        rows = sequences.all_rows
        if columns:
            return (rows // PAD * head_dim, PAD // 2), (rows // PAD * head_dim, PAD // GROUP_SIZE)
        if tokens:
            return (rows // 2, head_dim), (rows // GROUP_SIZE, head_dim)
        return (rows, head_dim // 2), (rows, head_dim // GROUP_SIZE)

    @classmethod
    def empty(cls, sequences: Sequences, head_dim: int, *, tokens: bool, columns: bool = False, device: torch.device) -> Codes:
        shapes = cls.shapes(sequences, head_dim, tokens=tokens, columns=columns)
        return cls(*(torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes))


class Keys(NamedTuple):
    """The keys that a key mask allows."""

    mask: torch.Tensor
    """uint8 [B, rows], by slot."""
    first: torch.Tensor
    """int32 [B]: the first allowed token of each sequence."""


def allowed_keys(key_mask: torch.Tensor | None, keys: Sequences) -> Keys | None:
    """A mask bool [B, Lk] by slot, counted from each sequence's first allowed key."""
    if key_mask is None:
        return None
    first = key_mask.to(torch.uint8).argmax(1)
    token = first[:, None] + torch.arange(keys.rows, device=key_mask.device) - keys.lead
    inside = (token >= first[:, None]) & (token < keys.length)
    mask = key_mask.gather(1, token.clamp(0, keys.length - 1)) & inside
    return Keys(mask.view(torch.uint8), first.to(torch.int32))


def block_of(head_dim: int) -> int:
    """The head dim rounded up to a power of two."""
    return 1 << (head_dim - 1).bit_length()


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16, which holds quantized values exactly. Under the interpreter float32 stays, so that tests see every bit."""
    return torch.float32 if INTERPRET.value and dtype == torch.float32 else torch.bfloat16


_ELEMENTS = 4096
"""Elements of a tile: 32 for each thread of four warps."""


def _block_l(block_d: int) -> int:
    return min(PAD, max(GROUP_SIZE, _ELEMENTS // block_d))


def strides_of(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of batch, heads, tokens and head dim; packed tensors [total, H, D] have no batch."""
    if x.ndim == 4:
        return x.stride()
    return (0, x.stride(1), x.stride(0), x.stride(2))


def quantize_rows(
    x: torch.Tensor,
    sequences: Sequences,
    *,
    keys: bool,
    order: int = 0,
    allowed: Keys | None = None,
    shift: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
    negate: bool = False,
    rotate: bool = False,
    four_over_six: bool = False,
    operand: bool = True,
    codes: Codes | None = None,
) -> torch.Tensor | None:
    """Q or K, [B, H, L, D] or [total, H, D] of any strides, quantized along the head dim.

    Returns:
        The operand unless it is not wanted; `codes` are written where they are given.

    Args:
        keys: K, minus `shift`. Otherwise Q, with the opposite sign if `negate`.
        order: ORDER of the operand's rows (_layout.py); 0 for slots in their own order. Codes have it only without an operand.
        shift: float32 [Hk, D], contiguous.
        dots: for Q, takes the product of each row with its key head's shift; float32 [B, H, L] or [H, total].
    """
    head_dim, block_d = x.shape[-1], block_of(x.shape[-1])
    block_l = _block_l(block_d)
    blocks = sequences.blocks(block_l)
    result = x.new_empty((sequences.all_rows, block_d), dtype=operand_dtype(x.dtype)) if operand else None
    dots_stride = (0, 0) if dots is None else (dots.stride(0), dots.stride(1)) if dots.ndim == 3 else (0, dots.stride(0))
    _quantize_rows_kernel[(sequences.count * sequences.heads * blocks,)](
        x, shift, *(allowed or (None, None)), sequences.cu, result, *(codes or (None, None)), dots,
        *strides_of(x), 0 if allowed is None else allowed.mask.stride(0), *dots_stride,
        sequences.heads, sequences.length, blocks, sequences.rows, 1 if shift is None else sequences.heads // shift.shape[0],
        -1.0 if negate else 1.0,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=block_l, LEAD=sequences.lead, ORDER=order, KEYS=keys,
        SHIFTED=shift is not None, MASKED=allowed is not None, VARLEN=sequences.cu is not None,
        ROTATE=rotate, FOUR_OVER_SIX=four_over_six, OPERAND=operand, CODES=codes is not None, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return result


def quantize_tokens(
    x: torch.Tensor,
    sequences: Sequences,
    *,
    allowed: Keys | None = None,
    quantized: bool = True,
    plain: bool = False,
    order: int = 0,
    four_over_six: bool = False,
    codes: Codes | None = None,
    columns: bool = False,
) -> list[torch.Tensor]:
    """V, [B, H, L, D] or [total, H, D] of any strides: the operand quantized along the tokens, and the one as it is.

    Those that are asked for, and `codes` if given, by rows or `columns` (`Codes.shapes`). `order` as in `quantize_rows`; codes
    are always in the order of the slots.
    """
    head_dim, block_d = x.shape[-1], block_of(x.shape[-1])
    # One warp holds whole groups of 16 tokens, so that their maxima are found without shared memory.
    block_c = min(block_d, 64)
    block_l = min(PAD, 1024 // block_c)
    blocks = sequences.blocks(block_l)
    shape, dtype = (sequences.all_rows, block_d), operand_dtype(x.dtype)
    operands = [x.new_empty(shape, dtype=dtype) if wanted else None for wanted in (quantized, plain)]
    _quantize_tokens_kernel[(sequences.count * sequences.heads * blocks, block_d // block_c)](
        x, *(allowed or (None, None)), sequences.cu, *operands, *(codes or (None, None)),
        *strides_of(x), 0 if allowed is None else allowed.mask.stride(0),
        sequences.heads, sequences.length, blocks, sequences.rows,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_C=block_c, BLOCK_L=block_l, LEAD=sequences.lead,
        MASKED=allowed is not None, VARLEN=sequences.cu is not None, FOUR_OVER_SIX=four_over_six, ORDER=order,
        QUANTIZED=quantized, PLAIN=plain, CODES=codes is not None, COLUMNS=columns, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return [operand for operand in operands if operand is not None]


def unpack(stored: Codes, dtype: torch.dtype, *, tokens: bool) -> torch.Tensor:
    """The operand of these values, slots in their own order; groups lie along the tokens (V) or along the head dim (Q, K)."""
    codes, scales = stored
    head_dim = codes.shape[1] if tokens else codes.shape[1] * 2
    rows, block_d = codes.shape[0] * (2 if tokens else 1), block_of(head_dim)
    operand = codes.new_empty((rows, block_d), dtype=dtype)
    block_l = _block_l(block_d)
    _unpack_kernel[(rows // block_l,)](
        codes, scales, operand,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=block_l, TOKENS=tokens, num_warps=4,
    )  # fmt: skip
    return operand
