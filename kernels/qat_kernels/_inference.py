"""Attention without gradients on FP4 matrix units: docs/NUMERICS.md, sections 3 and 4, with both products by `tl.dot_scaled`.

Q and K arrive packed along the head dim, V along the tokens; P~ is quantized and packed on the chip. With NATIVE off the same
kernel multiplies the exact values in BF16. The training forward, which reads those values from memory, has less to do then: this
is how the kernel is tested where there are no FP4 units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._forward import LN_2, soften
from ._layout import PAD, first_row, in_order, permuted, ranges, row_of, sequence, slot_of, to_groups, to_tile
from ._nvfp4 import (
    E2M1_ANCHOR,
    GROUP,
    P_GAIN,
    code_of_weights,
    dot,
    gain_of_weights,
    magnitude_bits,
    narrow,
    round_weights,
    scale_bits,
    scale_of,
    scale_of_weights,
    times,
    value_of,
)

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
"""Triton's version."""
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
def _load_rows(ptr, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """These rows of WIDTH elements: a tile of BLOCK columns, zeros beyond WIDTH."""
    columns = tl.arange(0, BLOCK)
    ptrs = ptr + rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    if WIDTH == BLOCK:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(columns < WIDTH)[None, :], other=0)


@triton.jit
def _load_columns(ptr, slot, PER: tl.constexpr, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """From `slot` on, COUNT elements that hold PER slots each, of every column of V: [BLOCK_D, COUNT], zeros beyond HEAD_DIM."""
    height: tl.constexpr = _PAD // PER
    columns = tl.arange(0, BLOCK_D)
    ptr += (slot // _PAD).to(tl.int64) * (HEAD_DIM * height)
    if height > COUNT:
        ptr += tl.multiple_of(slot % _PAD // PER, COUNT)
    ptrs = ptr + columns[:, None] * height + tl.arange(0, COUNT)[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(columns < HEAD_DIM)[:, None], other=0)


@triton.jit
def _values(codes, scales):
    """Packed rows, uint8 [R, C / 2] and E4M3 bytes [R, C / 16] -> bfloat16 [R, C], exact."""
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = scales.shape[1]
    codes = codes.to(tl.int32)
    x = tl.reshape(tl.join(value_of(codes & 15), value_of(codes >> 4)), (rows, groups, GROUP))
    x = x * scale_of(scales)[:, :, None]
    return narrow(tl.reshape(x, (rows, groups * GROUP)), tl.bfloat16)


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
        return dot(_values(q, q_scale), tl.trans(_values(k, k_scale)), acc)


@triton.jit
def pack_weights(groups, largest, CONVERT: tl.constexpr, PAIRS: tl.constexpr):
    """phi of P~, packed, in the order of the slots: uint8 [M, N / 2] and E4M3 bytes [M, N / 16].

    groups and their maxima as `to_groups` cuts them. The arithmetic is that of `round_weights`. CONVERT: values become codes by
    hardware, which rounds correctly the two values that docs/NUMERICS.md names, too.
    """
    scale = scale_of_weights(largest)
    if CONVERT:
        even, odd = _pairs(times(groups, gain_of_weights(scale, P_GAIN), PAIRS))
        codes = tl.inline_asm_elementwise(_PACK, "=r,f,f,f,f,f,f,f,f", [even, odd], dtype=tl.uint8, is_pure=True, pack=4)
        bits = scale.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        even, odd = _pairs(code_of_weights(groups * gain_of_weights(scale, P_GAIN * E2M1_ANCHOR)))
        codes = (magnitude_bits(even) | (magnitude_bits(odd) << 4)).to(tl.uint8)
        bits = scale_bits(scale, scale > 0)
    return codes, in_order(bits)


@triton.jit
def _pairs(groups):
    """Neighbouring columns of what `to_groups` cut: two tiles [M, N / 2]."""
    x = in_order(groups)
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _attend(
    out, total, row_max, q, q_scale,
    k_ptr, k_scale_ptr, vf_ptr, vf_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, mask_ptr, upper, slots, start, stop, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
    BOUNDED: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr, NATIVE: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """The online softmax over the slots from `start` to `stop` in tiles of BLOCK_N: as in _forward.py, on codes and scales.

    With QUANTIZE `out` takes PF~ VF, 2688 times too large, otherwise the unquantized P~ and V.
    """
    for first_slot in range(start, stop, BLOCK_N):
        rows = k_row + first_slot + tl.arange(0, BLOCK_N)
        k = _load_rows(k_ptr, rows, HEAD_DIM // 2, BLOCK_D // 2)
        k_scale = _load_rows(k_scale_ptr, rows, HEAD_DIM // GROUP, BLOCK_D // GROUP)
        scores = _scores(q, q_scale, k, k_scale, NATIVE)
        slot = first_slot + slot_of(tl.arange(0, BLOCK_N), ORDER)
        PAIRS: tl.constexpr = CONVERT and ORDER == 0  # sm_100
        if BOUNDED:
            allowed = slot[None, :] < upper[:, None]
            if MASKED:
                allowed = allowed & (tl.load(mask_ptr + slot) != 0)[None, :]
            scores = tl.where(allowed, scores, float("-inf"))
        groups, largest, reference, new_max, total = soften(to_groups(scores, ORDER), row_max, total, qk_scale, BOUNDED, PAIRS)
        if ORDER == 0:  # from tensor memory and back, whether it changes or not
            out = times(out, tl.exp2(row_max - reference)[:, None], PAIRS)
        # Integer maxima seldom change: most tiles need no rescaling at all.
        elif tl.max((new_max > row_max).to(tl.int32), 0) != 0:
            out = out * tl.exp2(row_max - reference)[:, None]
        row_max = new_max
        if QUANTIZE:
            v = _load_columns(vf_ptr, k_row + first_slot, 2, BLOCK_N // 2, HEAD_DIM, BLOCK_D)
            v_scale = _load_columns(vf_scale_ptr, k_row + first_slot, GROUP, BLOCK_N // GROUP, HEAD_DIM, BLOCK_D)
            if NATIVE:
                p, p_scale = pack_weights(groups, largest, CONVERT, PAIRS)
                out = _scaled_dot(p, p_scale, v, v_scale, out)
            else:
                p = narrow(to_tile(round_weights(groups, largest)), tl.bfloat16)
                out = dot(p, tl.trans(permuted(_values(v, v_scale), ORDER)), out)
        else:
            v = _load_plain(v_ptr, slot, slot < slots, v_stride_l, v_stride_d, HEAD_DIM, BLOCK_D, BOUNDED)
            out = dot(narrow(to_tile(groups), v.dtype), v, out)
    return out, total, row_max


@triton.jit
def _load_plain(v_ptr, key, present, stride_l, stride_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows of V itself, zeros where they are not `present`."""
    columns = tl.arange(0, BLOCK_D)
    ptrs = v_ptr + key.to(tl.int64)[:, None] * stride_l + columns.to(tl.int64)[None, :] * stride_d
    if BOUNDED:
        return tl.load(ptrs, mask=present[:, None] & (columns < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(columns < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _attend_kept(
    out, total, row_max, q, q_scale,
    k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, mask_ptr, own, slots, start, stop, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ORDER: tl.constexpr, LEAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The kept groups, with unquantized P~ and V: the sink group, then the open groups between `start` and `stop`.

    On tiles of their own that are one group wide: too narrow for FP4 units.
    """
    q = _values(q, q_scale)
    for block in range(tl.cdiv(tl.maximum(stop - start, 0), GROUP) + 1):
        first_slot = tl.where(block == 0, LEAD, start + (block - 1) * GROUP)
        lower = tl.where(block == 0, LEAD, tl.maximum(own & -GROUP, LEAD + GROUP))
        slot = first_slot + tl.arange(0, GROUP)
        rows = k_row + row_of(slot, ORDER)
        k = _load_rows(k_ptr, rows, HEAD_DIM // 2, BLOCK_D // 2)
        k_scale = _load_rows(k_scale_ptr, rows, HEAD_DIM // GROUP, BLOCK_D // GROUP)
        scores = dot(q, tl.trans(_values(k, k_scale)), tl.zeros((q.shape[0], GROUP), tl.float32))
        present = slot < slots
        if MASKED:
            present = present & (tl.load(mask_ptr + slot) != 0)
        allowed = (slot[None, :] >= lower[:, None]) & (slot[None, :] <= own[:, None]) & present[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
        groups, _, reference, new_max, total = soften(to_groups(scores, 0), row_max, total, qk_scale, True)
        rescale = tl.exp2(row_max - reference)
        row_max = new_max
        v = _load_plain(v_ptr, slot - LEAD, present, v_stride_l, v_stride_d, HEAD_DIM, BLOCK_D, True)
        out = dot(narrow(to_tile(groups), v.dtype), v, out * rescale[:, None])
    return out, total, row_max


@triton.jit
def inference_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, vf_ptr, vf_scale_ptr, v_ptr, mask_ptr, first_ptr, shift_dot_ptr, cu_q_ptr, cu_k_ptr,
    out_ptr, lse_ptr,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    lse_stride_b, lse_stride_h, mask_stride,
    heads, key_heads, queries, keys, blocks, q_rows, k_rows, qk_scale, shift_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ORDER: tl.constexpr,
    LEAD: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, VARLEN: tl.constexpr, QUANTIZE: tl.constexpr,
    SHIFTED: tl.constexpr, NATIVE: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head of one sequence.

    q, k, vf: codes and E4M3 bytes as `_quantize.Codes` has them, rows of K permuted by ORDER, V by columns; v and out in any
    layout, for packed sequences with batch stride 0; the rest as in `attention_forward_kernel`. NATIVE: multiply by
    `tl.dot_scaled`. CONVERT: P~ is packed by the instruction that sm_100 and later have.
    """
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if CAUSAL:  # the longest first
        block = blocks - 1 - block
    index, head = row_of_heads // heads, row_of_heads % heads
    key_head = head // (heads // key_heads)
    q_start, queries = sequence(cu_q_ptr, index, queries, VARLEN)
    k_start, keys = sequence(cu_k_ptr, index, keys, VARLEN)
    if block * BLOCK_M >= queries:
        return
    first = 0
    if MASKED:
        first = tl.load(first_ptr + index)
        mask_ptr += index.to(tl.int64) * mask_stride
    keys -= first
    slots = keys + LEAD
    q_row = first_row(index, head, heads, q_rows, q_start, 0, VARLEN)
    k_row = first_row(index, key_head, key_heads, k_rows, k_start, LEAD, VARLEN)
    v_ptr += index.to(tl.int64) * v_stride_b + key_head.to(tl.int64) * v_stride_h
    v_ptr += (k_start + first).to(tl.int64) * v_stride_l

    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = rows < queries
    q = _load_rows(q_ptr, q_row + rows, HEAD_DIM // 2, BLOCK_D // 2)
    q_scale = _load_rows(q_scale_ptr, q_row + rows, HEAD_DIM // GROUP, BLOCK_D // GROUP)

    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    own, upper, begin, full, stop, _, _ = ranges(
        rows, block * BLOCK_M, keys - queries + LEAD, slots, LEAD, CAUSAL, BLOCK_M, BLOCK_N
    )  # fmt: skip
    if MASKED:
        full = begin
    else:
        out, total, row_max = _attend(
            out, total, row_max, q, q_scale,
            k_ptr, k_scale_ptr, vf_ptr, vf_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, mask_ptr, upper, slots, begin, full,
            qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, ORDER, False, False, QUANTIZE, NATIVE, CONVERT,
        )  # fmt: skip
    out, total, row_max = _attend(
        out, total, row_max, q, q_scale,
        k_ptr, k_scale_ptr, vf_ptr, vf_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, mask_ptr, upper, slots, full, stop,
        qk_scale, HEAD_DIM, BLOCK_D, BLOCK_N, ORDER, True, MASKED, QUANTIZE, NATIVE, CONVERT,
    )  # fmt: skip
    if QUANTIZE:
        out = out * (1.0 / P_GAIN)
    if LEAD > 0:
        own_first = block * BLOCK_M + keys - queries + LEAD
        open_start = tl.maximum(own_first & -GROUP, begin)
        open_stop = tl.minimum(own_first + BLOCK_M, slots)
        out, total, row_max = _attend_kept(
            out, total, row_max, q, q_scale,
            k_ptr, k_scale_ptr, v_ptr, v_stride_l, v_stride_d, k_row, mask_ptr, own, slots, open_start, open_stop, qk_scale,
            HEAD_DIM, BLOCK_D, ORDER, LEAD, MASKED,
        )  # fmt: skip

    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(total)) * LN_2)
    lse_offsets = index.to(tl.int64) * lse_stride_b + head.to(tl.int64) * lse_stride_h + q_start + rows
    if SHIFTED:
        lse += shift_scale * tl.load(shift_dot_ptr + lse_offsets, mask=inside, other=0.0)
    tl.store(lse_ptr + lse_offsets, lse, mask=inside)
    out_ptr += index.to(tl.int64) * out_stride_b + head.to(tl.int64) * out_stride_h
    out_offsets = (q_start + rows).to(tl.int64)[:, None] * out_stride_l + columns.to(tl.int64)[None, :] * out_stride_d
    out = narrow(out / tl.where(empty, 1.0, total)[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offsets, out, mask=inside[:, None] & (columns < HEAD_DIM)[None, :])
