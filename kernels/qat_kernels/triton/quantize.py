"""What is done before attention itself: Q, K and V are quantized into operands of its kernels (layout.py) and into 4.5 bits a
value, and back; a key mask is brought into the order of their rows.

`prepare_kernel` does several of these in one launch, because to the host a launch costs more than the work does for short
sequences. operands.py launches the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import PAD, first_row, row_of, sequence
from .nvfp4 import (
    GROUP,
    ROTATION_GAIN,
    cast_rn,
    e2m1_codes,
    e2m1_to_float,
    e4m3_bits,
    e4m3_to_float,
    hadamard,
    round_groups,
    signed_values,
)
from .preprocess import preprocess

_PAD = tl.constexpr(PAD)


@triton.jit
def prepare_kernel(tensors, numbers, ends, JOBS):
    """Jobs that do not depend on each other: job n is that of the programs before ends[n] which no job before it has.

    JOBS: for each the place of its function below, and the constants of that; tensors and numbers: for each what its function
    takes. A program has one warp: it holds whole groups of 16 tokens, whose maxima are found without shared memory.
    """
    program = tl.program_id(0)
    start = 0
    for n in tl.static_range(len(JOBS)):
        if (program >= start) & (program < ends[n]):
            if JOBS[n][0] == 0:
                _quantize_rows(program - start, tensors[n], *numbers[n], *JOBS[n][1])
            elif JOBS[n][0] == 1:
                _quantize_tokens(program - start, tensors[n], *numbers[n], *JOBS[n][1])
            elif JOBS[n][0] == 2:
                _unpack_rows(program - start, tensors[n], *numbers[n], *JOBS[n][1])
            elif JOBS[n][0] == 3:
                _unpack_tokens(program - start, tensors[n], *numbers[n], *JOBS[n][1])
            else:
                preprocess(program - start, tensors[n], *numbers[n], *JOBS[n][1])
        start = ends[n]


@triton.jit
def _load_slots(
    program, columns, x_ptr, key_mask_ptr, leftpad_ptr, cu_seqlens_ptr, strides, sequences, HEAD_DIM: tl.constexpr,
    BLOCK_L: tl.constexpr, LEAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The BLOCK_L slots of a program: the values of these columns in float32, zero for what is no allowed token, which
    slots are allowed, sequence and head, the token of each slot, the first row of the head, the slots, and whether to stop.

    sequences: heads, tokens, blocks of a head, its rows, and the stride of the key mask from one sequence to the next.
    """
    num_heads, seqlen, num_blocks, rows, key_mask_stride = sequences
    stride_b, stride_h, stride_l, stride_d = strides
    batch_head, block = program // num_blocks, program % num_blocks
    batch, head = batch_head // num_heads, batch_head % num_heads
    start, seqlen = sequence(cu_seqlens_ptr, batch, seqlen, VARLEN)
    leftpad = 0
    if HAS_KEY_MASK:
        leftpad = tl.load(leftpad_ptr + batch)
    slots = block * BLOCK_L + tl.arange(0, BLOCK_L)
    key = slots - LEAD
    present = (key >= 0) & (key < seqlen - leftpad)
    if HAS_KEY_MASK:  # excluded keys are never used: they may hold anything
        present = present & (tl.load(key_mask_ptr + batch.to(tl.int64) * key_mask_stride + slots) != 0)
    token = start + leftpad + key
    columns = columns.to(tl.int64)
    x_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    where = present[:, None] & (columns < HEAD_DIM)[None, :]
    x = tl.load(x_ptr + token.to(tl.int64)[:, None] * stride_l + columns[None, :] * stride_d, mask=where, other=0.0)
    row = first_row(batch, head, num_heads, rows, start, LEAD, VARLEN).to(tl.int64)
    past_end = block * BLOCK_L >= tl.cdiv(seqlen - leftpad + LEAD, _PAD) * _PAD
    return x.to(tl.float32), present, batch, head, token, row, slots, past_end


@triton.jit
def _store_rows(ptr, rows, columns, values, WIDTH: tl.constexpr, CHECK_BOUNDS: tl.constexpr):
    """values into these columns of rows of WIDTH elements; CHECK_BOUNDS: some columns are beyond them."""
    if CHECK_BOUNDS:
        tl.store(ptr + rows[:, None] * WIDTH + columns[None, :], values, mask=(columns < WIDTH)[None, :])
    else:
        tl.store(ptr + rows[:, None] * WIDTH + columns[None, :], values)


@triton.jit
def _store_columns(ptr, rows, columns, values, WIDTH: tl.constexpr, HEIGHT: tl.constexpr, CHECK_BOUNDS: tl.constexpr):
    """As `_store_rows`, but every HEIGHT rows lie by columns: WIDTH columns of HEIGHT elements."""
    ptrs = ptr + (rows // HEIGHT * (WIDTH * HEIGHT) + rows % HEIGHT)[:, None] + columns[None, :] * HEIGHT
    if CHECK_BOUNDS:
        tl.store(ptrs, values, mask=(columns < WIDTH)[None, :])
    else:
        tl.store(ptrs, values)


@triton.jit
def _quantize_rows(
    program, tensors, strides, sequences, q_dot_k_shift_strides, heads_per_shift,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, LEAD: tl.constexpr, ORDER: tl.constexpr,
    IS_K: tl.constexpr, NEGATE: tl.constexpr, HAS_K_SHIFT: tl.constexpr, HAS_Q_SHIFT: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    VARLEN: tl.constexpr, ROTATE: tl.constexpr, ROUNDING, STORE_OPERAND: tl.constexpr, STORE_CODES: tl.constexpr,
):  # fmt: skip
    """K (IS_K) or Q minus its shift, Q with the opposite sign if NEGATE, quantized along the head dim.

    For Q, q_dot_k_shift takes the product of each row with the shift of K. For K, key_bias takes the product of each row with the
    shift of Q, by slot, in units of the scores of the operands, and with the sign that Q has in its own.
    """
    (
        x_ptr, k_shift_ptr, q_shift_ptr, key_mask_ptr, leftpad_ptr, cu_seqlens_ptr, operand_ptr, codes_ptr, scales_ptr,
        q_dot_k_shift_ptr, key_bias_ptr,
    ) = tensors  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    x, present, batch, head, token, row, slots, past_end = _load_slots(
        program, columns, x_ptr, key_mask_ptr, leftpad_ptr, cu_seqlens_ptr, strides, sequences,
        HEAD_DIM, BLOCK_L, LEAD, HAS_KEY_MASK, VARLEN,
    )  # fmt: skip
    if past_end:
        return
    if HAS_K_SHIFT:
        k_shift = tl.load(k_shift_ptr + (head // heads_per_shift) * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        if IS_K:
            x = tl.where(present[:, None], x - k_shift[None, :], 0.0)
        else:  # what the log-sum-exp lacks when the keys are shifted
            stride_b, stride_h = q_dot_k_shift_strides
            q_dot_k_shift_ptr += batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
            tl.store(q_dot_k_shift_ptr + token, tl.sum(x * k_shift[None, :], 1), mask=present)
    if HAS_Q_SHIFT:
        q_shift = tl.load(q_shift_ptr + (head // heads_per_shift) * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        if IS_K:
            key_bias = tl.sum(x * q_shift[None, :], 1)
            if ROTATE:
                key_bias *= ROTATION_GAIN * HEAD_DIM
            tl.store(key_bias_ptr + row + slots, -key_bias if NEGATE else key_bias)
        else:
            x = tl.where(present[:, None], x - q_shift[None, :], 0.0)
    if NEGATE and not IS_K:
        x = -x
    if ROTATE:
        x = hadamard(x, BLOCK_L, BLOCK_D)
    groups = tl.reshape(x, (BLOCK_L, BLOCK_D // GROUP, GROUP))
    magnitude, scale, finite = round_groups(groups, 2, *ROUNDING)
    ordered = row + row_of(slots, ORDER)
    if STORE_CODES:
        where = row + slots if STORE_OPERAND else ordered
        low, high = tl.split(tl.reshape(e2m1_codes(groups, magnitude, finite), (BLOCK_L, BLOCK_D // 2, 2)))
        pairs, group = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // GROUP)
        check_bounds: tl.constexpr = HEAD_DIM != BLOCK_D
        _store_rows(codes_ptr, where, pairs, (low | (high << 4)).to(tl.uint8), HEAD_DIM // 2, check_bounds)
        bits = tl.reshape(e4m3_bits(scale, finite), (BLOCK_L, BLOCK_D // GROUP))
        _store_rows(scales_ptr, where, group, bits, HEAD_DIM // GROUP, check_bounds)
    if STORE_OPERAND:
        values = tl.reshape(signed_values(groups, magnitude, scale, finite), (BLOCK_L, BLOCK_D))
        _store_rows(operand_ptr, ordered, columns, cast_rn(values, operand_ptr.dtype.element_ty), BLOCK_D, False)


@triton.jit
def _quantize_tokens(
    program, tensors, strides, sequences,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, LEAD: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr, ROUNDING, ORDER: tl.constexpr,
    STORE_QUANTIZED: tl.constexpr, STORE_UNQUANTIZED: tl.constexpr, STORE_CODES: tl.constexpr, COL_MAJOR: tl.constexpr,
):  # fmt: skip
    """V, quantized along the tokens from the first allowed one on, and as it is: BLOCK_C columns of BLOCK_L slots."""
    x_ptr, key_mask_ptr, leftpad_ptr, cu_seqlens_ptr, quantized_ptr, unquantized_ptr, codes_ptr, scales_ptr = tensors
    columns = program % (BLOCK_D // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    x, _, _, _, _, row, slots, past_end = _load_slots(
        program // (BLOCK_D // BLOCK_C), columns, x_ptr, key_mask_ptr, leftpad_ptr, cu_seqlens_ptr, strides, sequences,
        HEAD_DIM, BLOCK_L, LEAD, HAS_KEY_MASK, VARLEN,
    )  # fmt: skip
    if past_end:
        return
    where = row + row_of(slots, ORDER)
    if STORE_UNQUANTIZED:
        _store_rows(unquantized_ptr, where, columns, cast_rn(x, unquantized_ptr.dtype.element_ty), BLOCK_D, False)
    if STORE_QUANTIZED or STORE_CODES:
        groups = tl.reshape(x, (BLOCK_L // GROUP, GROUP, BLOCK_C))
        magnitude, scale, finite = round_groups(groups, 1, *ROUNDING)
        if STORE_QUANTIZED:
            values = tl.reshape(signed_values(groups, magnitude, scale, finite), (BLOCK_L, BLOCK_C))
            _store_rows(quantized_ptr, where, columns, cast_rn(values, quantized_ptr.dtype.element_ty), BLOCK_D, False)
        if STORE_CODES:
            first_slot = row + tl.min(slots, 0)
            pairs = first_slot // 2 + tl.arange(0, BLOCK_L // 2)
            group = first_slot // GROUP + tl.arange(0, BLOCK_L // GROUP)
            codes = tl.reshape(e2m1_codes(groups, magnitude, finite), (BLOCK_L // 2, 2, BLOCK_C))
            low, high = tl.split(tl.permute(codes, (0, 2, 1)))
            codes = (low | (high << 4)).to(tl.uint8)
            bits = tl.reshape(e4m3_bits(scale, finite), (BLOCK_L // GROUP, BLOCK_C))
            if COL_MAJOR:
                _store_columns(codes_ptr, pairs, columns, codes, HEAD_DIM, _PAD // 2, HEAD_DIM != BLOCK_D)
                _store_columns(scales_ptr, group, columns, bits, HEAD_DIM, _PAD // GROUP, HEAD_DIM != BLOCK_D)
            else:
                _store_rows(codes_ptr, pairs, columns, codes, HEAD_DIM, HEAD_DIM != BLOCK_D)
                _store_rows(scales_ptr, group, columns, bits, HEAD_DIM, HEAD_DIM != BLOCK_D)


@triton.jit
def fake_quantize_kv_kernel(
    k_ptr, v_ptr, key_mask_ptr, k_out_ptr, v_out_ptr,
    k_stride_b, k_stride_h, k_stride_l, k_stride_d, v_stride_b, v_stride_h, v_stride_l, v_stride_d, num_heads, seqlen, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """K (program_id 1 = 0) or V, [B, H, L, D] of any strides, quantized along the head dim and back, into contiguous tensors.

    A row is one token of one head; key_mask uint8 [B, L]: rows that it excludes become zero, also if they hold NaN.
    """
    rows, columns = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L).to(tl.int64), tl.arange(0, BLOCK_D)
    batch, head, token = rows // seqlen // num_heads, rows // seqlen % num_heads, rows % seqlen
    present = rows < num_rows
    if HAS_KEY_MASK:
        present = present & (tl.load(key_mask_ptr + batch * seqlen + token, mask=present, other=0) != 0)
    inside = (columns < HEAD_DIM)[None, :]
    if tl.program_id(1) == 0:
        ptrs = k_ptr + (batch * k_stride_b + head * k_stride_h + token * k_stride_l)[:, None] + columns[None, :] * k_stride_d
        out_ptr = k_out_ptr
    else:
        ptrs = v_ptr + (batch * v_stride_b + head * v_stride_h + token * v_stride_l)[:, None] + columns[None, :] * v_stride_d
        out_ptr = v_out_ptr
    x = tl.load(ptrs, mask=present[:, None] & inside, other=0.0).to(tl.float32)
    groups = tl.reshape(x, (BLOCK_L, BLOCK_D // GROUP, GROUP))
    magnitude, scale, finite = round_groups(groups, 2, FOUR_OVER_SIX, RECIPROCAL)
    values = tl.reshape(signed_values(groups, magnitude, scale, finite), (BLOCK_L, BLOCK_D))
    out_ptrs = out_ptr + rows[:, None] * HEAD_DIM + columns[None, :]
    tl.store(out_ptrs, cast_rn(values, out_ptr.dtype.element_ty), mask=(rows < num_rows)[:, None] & inside)


@triton.jit
def _unpack_rows(program, tensors, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr):
    """Codes and scales of groups along the head dim into an operand, slots in their own order."""
    codes_ptr, scales_ptr, operand_ptr = tensors
    slots = program.to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    pairs, group = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // GROUP)
    valid = (pairs < HEAD_DIM // 2)[None, :]
    codes = tl.load(codes_ptr + slots[:, None] * (HEAD_DIM // 2) + pairs[None, :], mask=valid, other=0).to(tl.int32)
    codes = tl.reshape(tl.join(codes & 15, codes >> 4), (BLOCK_L, BLOCK_D // GROUP, GROUP))
    valid = (group < HEAD_DIM // GROUP)[None, :]
    scales = tl.load(scales_ptr + slots[:, None] * (HEAD_DIM // GROUP) + group[None, :], mask=valid, other=0)
    values = tl.reshape(e2m1_to_float(codes) * e4m3_to_float(scales)[:, :, None], (BLOCK_L, BLOCK_D))
    _store_rows(operand_ptr, slots, tl.arange(0, BLOCK_D), cast_rn(values, operand_ptr.dtype.element_ty), BLOCK_D, False)


@triton.jit
def _unpack_tokens(program, tensors, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    """The same of groups along the tokens: BLOCK_C columns of BLOCK_L slots."""
    codes_ptr, scales_ptr, operand_ptr = tensors
    columns = program % (BLOCK_D // BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_slot = (program // (BLOCK_D // BLOCK_C)).to(tl.int64) * BLOCK_L
    valid = (columns < HEAD_DIM)[None, :]
    pairs = first_slot // 2 + tl.arange(0, BLOCK_L // 2)
    codes = tl.load(codes_ptr + pairs[:, None] * HEAD_DIM + columns[None, :], mask=valid, other=0).to(tl.int32)
    codes = tl.reshape(tl.permute(tl.join(codes & 15, codes >> 4), (0, 2, 1)), (BLOCK_L // GROUP, GROUP, BLOCK_C))
    group = first_slot // GROUP + tl.arange(0, BLOCK_L // GROUP)
    scales = tl.load(scales_ptr + group[:, None] * HEAD_DIM + columns[None, :], mask=valid, other=0)
    values = tl.reshape(e2m1_to_float(codes) * e4m3_to_float(scales)[:, None, :], (BLOCK_L, BLOCK_C))
    slots = first_slot + tl.arange(0, BLOCK_L)
    _store_rows(operand_ptr, slots, columns, cast_rn(values, operand_ptr.dtype.element_ty), BLOCK_D, False)


@triton.jit(do_not_specialize=["seqlen"])
def allowed_keys_kernel(
    key_mask_ptr, allowed_ptr, leftpad_ptr, stride_b, stride_l, seqlen, rows, LEAD: tl.constexpr, BLOCK_L: tl.constexpr
):
    """A key mask [B, Lk] becomes uint8 [B, rows] by slot, and int32 [B]: the first allowed key, or 0 if there is none."""
    batch, block = tl.program_id(0), tl.program_id(1)
    key_mask_ptr += batch.to(tl.int64) * stride_b
    offsets = tl.arange(0, BLOCK_L)
    leftpad, start = seqlen, 0
    while (leftpad == seqlen) & (start < seqlen):
        key = start + offsets
        allowed = tl.load(key_mask_ptr + key.to(tl.int64) * stride_l, mask=key < seqlen, other=0) != 0  # [BLOCK_L]
        leftpad = tl.min(tl.where(allowed, key, seqlen), 0)
        start += BLOCK_L
    leftpad = tl.where(leftpad == seqlen, 0, leftpad)
    if block == 0:
        tl.store(leftpad_ptr + batch, leftpad)
    slots = block * BLOCK_L + offsets
    key = leftpad + slots - LEAD
    inside = (slots >= LEAD) & (key < seqlen)
    allowed = tl.load(key_mask_ptr + key.to(tl.int64) * stride_l, mask=inside, other=0) != 0  # [BLOCK_L]
    tl.store(allowed_ptr + batch.to(tl.int64) * rows + slots, allowed.to(tl.uint8), mask=slots < rows)
