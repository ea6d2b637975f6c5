"""Attention without gradients on FP4 matrix units: docs/NUMERICS.md, sections 3 and 4, with both products by `tl.dot_scaled`.

Q and K arrive packed along the head dim, V along the tokens; P~ is quantized and packed on the chip. With NATIVE off the same
kernel multiplies the exact values in BF16. The training forward, which reads those values from memory, has less to do then: this
is how the kernel is tested where there are no FP4 units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qat_kernels.triton.forward import LN_2, exponentials, online_softmax_step
from qat_kernels.triton.layout import (
    PAD,
    first_row,
    in_order,
    permuted,
    row_of,
    sequence,
    slot_of,
    slot_ranges,
    to_groups,
    to_tile,
)
from qat_kernels.triton.nvfp4 import (
    E2M1_ANCHOR,
    GROUP,
    P_GLOBAL_SCALE,
    cast_rn,
    dot,
    e2m1_bits,
    e2m1_to_float,
    e4m3_bits,
    e4m3_to_float,
    encode_scale_of_p,
    fake_quantize_p,
    mul,
    round_p_to_e2m1,
    scale_of_p,
)
from qat_kernels.triton.scores import add_key_bias

_PAD = tl.constexpr(PAD)
# Pairs of float32 to bytes, four bytes a call: the even element of a pair is the lower half of its byte.
_PACK = tl.constexpr(
    """{
    .reg .b8 a, b, c, d;
    cvt.rn.satfinite.e2m1x2.f32 a, $5, $1; cvt.rn.satfinite.e2m1x2.f32 b, $6, $2;
    cvt.rn.satfinite.e2m1x2.f32 c, $7, $3; cvt.rn.satfinite.e2m1x2.f32 d, $8, $4;
    mov.b32 $0, {a, b, c, d};
    }"""
)


@triton.jit
def _load_rows(ptr, first, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """These rows, counted from `first` on, of WIDTH elements: a tile of BLOCK columns, zeros beyond WIDTH."""
    columns = tl.arange(0, BLOCK)
    # One sum of 64 bits for all, then small offsets.
    ptrs = ptr + first.to(tl.int64) * WIDTH + (rows[:, None] * WIDTH + columns[None, :])
    if WIDTH == BLOCK:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(columns < WIDTH)[None, :], other=0)


@triton.jit
def _load_columns(ptr, slot, PER: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """From `slot` on, COUNT elements that hold PER slots each, of every column of V: [BLOCK_D, COUNT], zeros beyond HEAD_DIM."""
    height: tl.constexpr = _PAD // PER
    columns = tl.arange(0, BLOCK_D)
    if height == COUNT and HEAD_DIM % PER == 0:  # `slot` is a multiple of _PAD; this takes fewer instructions
        ptr += slot.to(tl.int64) * (HEAD_DIM // PER)
    else:
        ptr += (slot // _PAD).to(tl.int64) * (HEAD_DIM * height)
        if height > COUNT:
            ptr += tl.multiple_of(slot % _PAD // PER, COUNT)
    ptrs = ptr + (columns[:, None] * height + tl.arange(0, COUNT)[None, :])
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(columns < HEAD_DIM)[:, None], other=0)


@triton.jit
def _load_row_scales(ptr, first, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scales of these rows, counted from `first` on: uint8 [rows, BLOCK_D / 16].

    Of 64 values they are a word. Words can be copied to shared memory while others multiply, single bytes cannot.
    """
    if HEAD_DIM % 64 == 0:
        words = _load_rows(ptr.to(tl.pointer_type(tl.int32)), first, rows, HEAD_DIM // 64, BLOCK_D // 64)
        return _bytes_of(words)
    else:
        return _load_rows(ptr, first, rows, HEAD_DIM // GROUP, BLOCK_D // GROUP)


@triton.jit
def _load_column_scales(ptr, slot, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Scales of BLOCK_N slots, from `slot` on, of every column of V: uint8 [BLOCK_D, BLOCK_N / 16]."""
    if BLOCK_N % 64 == 0:
        words = _load_columns(ptr.to(tl.pointer_type(tl.int32)), slot, 64, BLOCK_N // 64, HEAD_DIM, BLOCK_D)
        return _bytes_of(words)
    else:
        return _load_columns(ptr, slot, GROUP, BLOCK_N // GROUP, HEAD_DIM, BLOCK_D)


@triton.jit
def _bytes_of(words):
    """int32 [R, C] -> uint8 [R, 4 C], the lowest byte of each first."""
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    return tl.reshape(tl.join(even, odd), (words.shape[0], 4 * words.shape[1]))


@triton.jit
def _dequantize(codes, scales):
    """Packed rows, uint8 [R, C / 2] and E4M3 bytes [R, C / 16] -> bfloat16 [R, C], exact."""
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = scales.shape[1]
    codes = codes.to(tl.int32)
    x = tl.reshape(tl.join(e2m1_to_float(codes & 15), e2m1_to_float(codes >> 4)), (rows, groups, GROUP))
    x = x * e4m3_to_float(scales)[:, :, None]
    return cast_rn(tl.reshape(x, (rows, groups * GROUP)), tl.bfloat16)


@triton.jit
def _scaled_dot(a, a_scale, b, b_scale, acc):
    """acc + a b^T of packed rows on FP4 units: uint8 [M, K / 2] and [N, K / 2], E4M3 bytes [M, K / 16] and [N, K / 16]."""
    a_scale, b_scale = a_scale.to(tl.float8e4nv, bitcast=True), b_scale.to(tl.float8e4nv, bitcast=True)
    return tl.dot_scaled(a, a_scale, "e2m1", tl.trans(b), b_scale, "e2m1", acc)


@triton.jit
def _scores(q, q_scale, k, k_scale, NATIVE: tl.constexpr):
    """Q K^T of packed rows."""
    acc = tl.zeros((q.shape[0], k.shape[0]), tl.float32)
    if NATIVE:
        return _scaled_dot(q, q_scale, k, k_scale, acc)
    else:
        return dot(_dequantize(q, q_scale), tl.trans(_dequantize(k, k_scale)), acc)


@triton.jit
def quantize_p(groups, group_max, HW_CONVERT: tl.constexpr, F32X2: tl.constexpr):
    """phi of P~, packed, in the order of the slots: uint8 [M, N / 2] and E4M3 bytes [M, N / 16].

    groups and their maxima as `to_groups` cuts them. The arithmetic is that of `fake_quantize_p`. HW_CONVERT: values become codes
    by hardware, which rounds correctly the two values that docs/NUMERICS.md names, too.
    """
    scale = scale_of_p(group_max)
    if HW_CONVERT:
        even, odd = _even_odd(mul(groups, encode_scale_of_p(scale, P_GLOBAL_SCALE), F32X2))
        codes = tl.inline_asm_elementwise(_PACK, "=r,f,f,f,f,f,f,f,f", [even, odd], dtype=tl.uint8, is_pure=True, pack=4)
        bits = scale.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        even, odd = _even_odd(round_p_to_e2m1(groups * encode_scale_of_p(scale, P_GLOBAL_SCALE * E2M1_ANCHOR)))
        codes = (e2m1_bits(even) | (e2m1_bits(odd) << 4)).to(tl.uint8)
        bits = e4m3_bits(scale, scale > 0)
    return codes, in_order(bits)


@triton.jit
def _even_odd(groups):
    """Neighbouring columns of what `to_groups` cut: two tiles [M, N / 2]."""
    x = in_order(groups)
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _partial_sums(p, ORDER: tl.constexpr):
    """Sums of parts of the rows of what `to_groups` cut, each of values in one thread: they are added up after the last tile."""
    if ORDER == 0:
        return tl.sum(tl.sum(tl.sum(tl.sum(p, 5), 4), 3), 2)
    else:
        sums = tl.sum(tl.sum(tl.sum(p, 5), 2), 1)
        return tl.reshape(sums, (p.shape[0], 4))


@triton.jit
def _attend(
    out, row_sum, row_max, q, q_scale,
    k_ptr, k_scale_ptr, v_fp4_ptr, v_fp4_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, key_mask_ptr, key_bias_ptr,
    upper, slots, start, stop, softmax_scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr, CHECK_BOUNDS: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, KEY_BIAS: tl.constexpr, QUANTIZE_PV: tl.constexpr, NATIVE: tl.constexpr, HW_CONVERT: tl.constexpr,
):  # fmt: skip
    """The online softmax over the slots from `start` to `stop` in tiles of BLOCK_N: as in triton/forward.py, on codes and scales.

    With QUANTIZE_PV `out` takes PF~ VF, 2688 times too large, otherwise the unquantized P~ and V. With KEY_BIAS key_bias
    float32 [slots] is added to the scores of all rows.
    """
    for first_slot in range(start, stop, BLOCK_N):
        rows = tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, k_row + first_slot, rows, HEAD_DIM // 2, BLOCK_D // 2)
        k_scale = _load_row_scales(k_scale_ptr, k_row + first_slot, rows, HEAD_DIM, BLOCK_D)
        scores = _scores(q, q_scale, k, k_scale, NATIVE)
        slot = first_slot + slot_of(tl.arange(0, BLOCK_N), ORDER)
        if KEY_BIAS:
            scores = add_key_bias(scores, tl.load(key_bias_ptr + slot)[None, :])
        F32X2: tl.constexpr = HW_CONVERT and ORDER == 0  # sm_100
        if CHECK_BOUNDS:
            allowed = slot[None, :] < upper[:, None]
            if HAS_KEY_MASK:
                allowed = allowed & (tl.load(key_mask_ptr + slot) != 0)[None, :]
            scores = tl.where(allowed, scores, float("-inf"))
        groups = to_groups(scores, ORDER)
        if NATIVE:
            p, group_max, row_max_safe, row_max_new = exponentials(groups, row_max, softmax_scale_log2, CHECK_BOUNDS, F32X2)
            row_sum = row_sum * tl.exp2(row_max - row_max_safe)[:, None] + _partial_sums(p, ORDER)
        else:
            p, group_max, row_max_safe, row_max_new, row_sum = online_softmax_step(
                groups, row_max, row_sum, softmax_scale_log2, CHECK_BOUNDS
            )  # fmt: skip
        if ORDER == 0:  # from tensor memory and back, whether it changes or not
            out = mul(out, tl.exp2(row_max - row_max_safe)[:, None], F32X2)
        # Integer maxima seldom change: most tiles need no rescaling at all.
        elif tl.max((row_max_new > row_max).to(tl.int32), 0) != 0:
            out = out * tl.exp2(row_max - row_max_safe)[:, None]
        row_max = row_max_new
        if QUANTIZE_PV:
            v = _load_columns(v_fp4_ptr, k_row + first_slot, 2, BLOCK_N // 2, HEAD_DIM, BLOCK_D)
            v_scale = _load_column_scales(v_fp4_scale_ptr, k_row + first_slot, BLOCK_N, HEAD_DIM, BLOCK_D)
            if NATIVE:
                p_codes, p_scale = quantize_p(p, group_max, HW_CONVERT, F32X2)
                out = _scaled_dot(p_codes, p_scale, v, v_scale, out)
            else:
                p_fq = cast_rn(to_tile(fake_quantize_p(p, group_max)), tl.bfloat16)
                out = dot(p_fq, tl.trans(permuted(_dequantize(v, v_scale), ORDER)), out)
        else:
            v = _load_v(v_ptr, slot, slot < slots, v_stride_l, v_stride_d, HEAD_DIM, BLOCK_D, CHECK_BOUNDS)
            out = dot(cast_rn(to_tile(p), v.dtype), v, out)
    return out, row_sum, row_max


@triton.jit
def _load_v(v_ptr, key, present, stride_l, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_BOUNDS: tl.constexpr):
    """Rows of V itself, zeros where they are not `present`."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = v_ptr + key.to(tl.int64)[:, None] * stride_l + columns.to(tl.int64)[None, :] * stride_d
    if CHECK_BOUNDS:
        return tl.load(ptrs, mask=present[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _attend_kept(
    out, row_sum, row_max, q, q_scale,
    k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, key_mask_ptr, key_bias_ptr, q_pos, slots, start, stop,
    softmax_scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ORDER: tl.constexpr, LEAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    KEY_BIAS: tl.constexpr,
):  # fmt: skip
    """The kept groups, with unquantized P~ and V: the sink group, then the open groups between `start` and `stop`.

    On tiles of their own that are one group wide: too narrow for FP4 units.
    """
    q = _dequantize(q, q_scale)
    for block in range(tl.cdiv(tl.maximum(stop - start, 0), GROUP) + 1):
        first_slot = tl.where(block == 0, LEAD, start + (block - 1) * GROUP)
        lower = tl.where(block == 0, LEAD, tl.maximum(q_pos & -GROUP, LEAD + GROUP))
        slot = first_slot + tl.arange(0, GROUP)
        rows = row_of(slot, ORDER) - first_slot
        k = _load_rows(k_ptr, k_row + first_slot, rows, HEAD_DIM // 2, BLOCK_D // 2)
        k_scale = _load_row_scales(k_scale_ptr, k_row + first_slot, rows, HEAD_DIM, BLOCK_D)
        scores = dot(q, tl.trans(_dequantize(k, k_scale)), tl.zeros((q.shape[0], GROUP), tl.float32))
        if KEY_BIAS:
            scores = add_key_bias(scores, tl.load(key_bias_ptr + slot)[None, :])
        present = slot < slots
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask_ptr + slot) != 0)
        allowed = (slot[None, :] >= lower[:, None]) & (slot[None, :] <= q_pos[:, None]) & present[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
        p, _, row_max_safe, row_max_new, row_sum = online_softmax_step(
            to_groups(scores, 0), row_max, row_sum, softmax_scale_log2, True
        )  # fmt: skip
        rescale = tl.exp2(row_max - row_max_safe)
        row_max = row_max_new
        v = _load_v(v_ptr, slot - LEAD, present, v_stride_l, v_stride_d, HEAD_DIM, BLOCK_D, True)
        out = dot(cast_rn(to_tile(p), v.dtype), v, out * rescale[:, None])
    return out, row_sum, row_max


@triton.jit
def inference_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_fp4_ptr, v_fp4_scale_ptr, v_ptr,
    key_mask_ptr, leftpad_ptr, q_dot_k_shift_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, key_bias_ptr,
    out_ptr, lse_ptr,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    lse_stride_b, lse_stride_h, key_mask_stride,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, q_rows, k_rows, softmax_scale_log2, k_shift_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
    LEAD: tl.constexpr, CAUSAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, VARLEN: tl.constexpr, QUANTIZE_PV: tl.constexpr,
    KEY_BIAS: tl.constexpr, HAS_K_SHIFT: tl.constexpr, NATIVE: tl.constexpr, HW_CONVERT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one sequence.

    q, k, v_fp4: codes and E4M3 bytes as `operands.Codes` has them, rows of K permuted by ORDER, V by columns; v and out in any
    layout, for packed sequences with batch stride 0; the rest as in `attention_forward_kernel`. NATIVE: multiply by
    `tl.dot_scaled`. HW_CONVERT: P~ is packed by the instruction that sm_100 and later have.
    """
    batch_head, block = tl.program_id(0) // num_blocks, tl.program_id(0) % num_blocks
    if CAUSAL:  # the longest first
        block = num_blocks - 1 - block
    batch, head = batch_head // num_heads, batch_head % num_heads
    head_k = head // (num_heads // num_heads_k)
    q_start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    if block * BLOCK_M >= seqlen_q:
        return
    leftpad = 0
    if HAS_KEY_MASK:
        leftpad = tl.load(leftpad_ptr + batch)
        key_mask_ptr += batch.to(tl.int64) * key_mask_stride
    seqlen_k -= leftpad
    slots = seqlen_k + LEAD
    q_row = first_row(batch, head, num_heads, q_rows, q_start, 0, VARLEN) + block * BLOCK_M
    k_row = first_row(batch, head_k, num_heads_k, k_rows, k_start, LEAD, VARLEN)
    if KEY_BIAS:
        key_bias_ptr += k_row
    v_ptr += batch.to(tl.int64) * v_stride_b + head_k.to(tl.int64) * v_stride_h
    v_ptr += (k_start + leftpad).to(tl.int64) * v_stride_l

    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < seqlen_q
    q = _load_rows(q_ptr, q_row, tl.arange(0, BLOCK_M), HEAD_DIM // 2, BLOCK_D // 2)
    q_scale = _load_row_scales(q_scale_ptr, q_row, tl.arange(0, BLOCK_M), HEAD_DIM, BLOCK_D)

    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if NATIVE:
        row_sum = tl.zeros((BLOCK_M, BLOCK_N // GROUP if ORDER == 0 else 4), tl.float32)
    else:
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    q_pos, upper, begin, full, stop, _, _ = slot_ranges(
        rows, block * BLOCK_M, seqlen_k - seqlen_q + LEAD, slots, LEAD, CAUSAL, BLOCK_M, BLOCK_N
    )  # fmt: skip
    if HAS_KEY_MASK:
        full = begin
    else:
        out, row_sum, row_max = _attend(
            out, row_sum, row_max, q, q_scale,
            k_ptr, k_scale_ptr, v_fp4_ptr, v_fp4_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, key_mask_ptr, key_bias_ptr,
            upper, slots, begin, full, softmax_scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_N, ORDER, False, False, KEY_BIAS, QUANTIZE_PV, NATIVE, HW_CONVERT,
        )  # fmt: skip
    out, row_sum, row_max = _attend(
        out, row_sum, row_max, q, q_scale,
        k_ptr, k_scale_ptr, v_fp4_ptr, v_fp4_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, key_mask_ptr, key_bias_ptr,
        upper, slots, full, stop, softmax_scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_N, ORDER, True, HAS_KEY_MASK, KEY_BIAS, QUANTIZE_PV, NATIVE, HW_CONVERT,
    )  # fmt: skip
    if NATIVE:
        row_sum = tl.sum(row_sum, 1)
    if QUANTIZE_PV:
        out = out * (1.0 / P_GLOBAL_SCALE)
    if LEAD > 0:
        first_q_pos = block * BLOCK_M + seqlen_k - seqlen_q + LEAD
        open_start = tl.maximum(first_q_pos & -GROUP, begin)
        open_stop = tl.minimum(first_q_pos + BLOCK_M, slots)
        out, row_sum, row_max = _attend_kept(
            out, row_sum, row_max, q, q_scale,
            k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, key_mask_ptr, key_bias_ptr,
            q_pos, slots, open_start, open_stop, softmax_scale_log2,
            HEAD_DIM, BLOCK_D, ORDER, LEAD, HAS_KEY_MASK, KEY_BIAS,
        )  # fmt: skip

    empty = row_sum == 0.0
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    lse_offsets = batch.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + q_start + rows
    if HAS_K_SHIFT:
        lse += k_shift_scale * tl.load(q_dot_k_shift_ptr + lse_offsets, mask=inside, other=0.0)
    tl.store(lse_ptr + lse_offsets, lse, mask=inside)
    out_ptr += batch.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_offsets = (q_start + rows).to(tl.int64)[:, None] * out_stride_l + columns.to(tl.int64)[None, :] * out_stride_d
    out = cast_rn(out / tl.where(empty, 1.0, row_sum)[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offsets, out, mask=inside[:, None] & (columns < HEAD_DIM)[None, :])
