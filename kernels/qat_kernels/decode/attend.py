"""Attention over the packed cache of cache.py in Triton: split over keys, then combined in a fixed order.

A program takes the query heads that share a key head as the rows of one tile, so that the cache is read once for all of them.
The reference is `KVCache.attention` in eager PyTorch; the layout of the cache is that of byte_layout.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qat_kernels.triton.nvfp4 import (
    GROUP,
    INTERPRET,
    P_GLOBAL_SCALE,
    cast_rn,
    dot,
    fake_quantize_p,
    hadamard,
    round_groups,
    signed_values,
)

from .byte_layout import BLOCK_TOKENS

LN_2 = tl.constexpr(0.6931471805599453)
BLOCK = tl.constexpr(BLOCK_TOKENS)
"""Keys of a tile, and tokens of a block of packed values."""
UNPACK_SCALE = tl.constexpr(2.0**-14)
"""What `unpack` returns is code * scale * UNPACK_SCALE. A code's three magnitude bits at bits 9 to 11 of a float16 are the code
times 2^-14, subnormals included, and its product with an E4M3 scale is a multiple of 2^-24: exact in float16."""

# $8: a word of eight codes, $9: the byte of their scale. Two codes at a time are shifted to where a float16 has its sign and
# magnitude; elements 2 p and 2 p + 1 of the word leave as one register cut in two.
_SCALE = "mul.lo.u32 m, $9, 0x0101; cvt.u16.u32 h, m; cvt.rn.f16x2.e4m3x2 f, h;"
# Before sm_89: shifted to bits 7 to 13, the scale is 2^-8 times too small; the scale NaN (0x7F) carries into bit 7.
_SCALE_BEFORE_SM_89 = """
    mul.lo.u32 m, $9, 0x00010001; shl.b32 f, m, 7; mul.f16x2 f, f, c;
    add.u32 m, m, 0x00010001; and.b32 m, m, 0x00800080; mul.lo.u32 m, m, 0xF8; or.b32 f, f, m;
"""
_DECODE = """
    shl.b32 m, $8, 9; shl.b32 s, $8, 12; and.b32 s, s, 0x80008000; lop3.b32 m, m, 0x0E000E00, s, 0xEA;
    mul.f16x2 m, m, f; mov.b32 {$0, $1}, m;
    shl.b32 m, $8, 5; shl.b32 s, $8, 8;  and.b32 s, s, 0x80008000; lop3.b32 m, m, 0x0E000E00, s, 0xEA;
    mul.f16x2 m, m, f; mov.b32 {$2, $3}, m;
    shl.b32 m, $8, 1; shl.b32 s, $8, 4;  and.b32 s, s, 0x80008000; lop3.b32 m, m, 0x0E000E00, s, 0xEA;
    mul.f16x2 m, m, f; mov.b32 {$4, $5}, m;
    shr.b32 m, $8, 3; and.b32 s, $8, 0x80008000; lop3.b32 m, m, 0x0E000E00, s, 0xEA;
    mul.f16x2 m, m, f; mov.b32 {$6, $7}, m;
"""
_REGISTERS = ".reg .b32 m, s, f, c; .reg .b16 h; mov.b32 c, 0x5C005C00;"
_ASM = tl.constexpr("{" + _REGISTERS + _SCALE + _DECODE + "}")
_ASM_BEFORE_SM_89 = tl.constexpr("{" + _REGISTERS + _SCALE_BEFORE_SM_89 + _DECODE + "}")
_CONSTRAINTS = tl.constexpr(",".join(["=&h"] * 8 + ["r", "r"]))


@triton.jit
def _value(word, scale, SHIFT: tl.constexpr):
    """The float16 of the code at a bit of a word and an E4M3 byte, times UNPACK_SCALE.

    For the interpreter, which would round a conversion from E4M3 wrongly.
    """
    code = (word >> SHIFT) & 15
    magnitude = ((code & 7) << 9).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    factor = (scale << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    factor = tl.where(scale == 0x7F, float("nan"), factor)
    return (tl.where(code > 7, -magnitude, magnitude) * factor).to(tl.float16)


@triton.jit
def _decode(words, scale, BEFORE_SM_89: tl.constexpr):
    """int32 [R, C] each -> float16 [R, C, 8]: the elements of every word."""
    if INTERPRET:
        x0, x1 = _value(words, scale, 0), _value(words, scale, 16)
        x2, x3 = _value(words, scale, 4), _value(words, scale, 20)
        x4, x5 = _value(words, scale, 8), _value(words, scale, 24)
        x6, x7 = _value(words, scale, 12), _value(words, scale, 28)
    else:
        asm: tl.constexpr = _ASM_BEFORE_SM_89 if BEFORE_SM_89 else _ASM
        x0, x1, x2, x3, x4, x5, x6, x7 = tl.inline_asm_elementwise(
            asm, _CONSTRAINTS, [words, scale], is_pure=True, pack=1,
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        )  # fmt: skip
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    x = tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], 8))
    return x if INTERPRET else x.to(tl.float16, bitcast=True)


@triton.jit
def unpack(words, scales, BEFORE_SM_89: tl.constexpr):
    """Rows of the cache, int32 [R, 4 I] and E4M3 bytes [R, 2 I] -> float16 [32 I, R], times UNPACK_SCALE.

    The lane that loads a word is the one that feeds its elements to the tensor cores: no data moves between lanes.
    """
    rows: tl.constexpr = words.shape[0]
    count: tl.constexpr = words.shape[1] // 4
    scale = tl.broadcast_to(tl.reshape(scales.to(tl.int32), (rows, 2, 1, count)), (rows, 2, 2, count))
    x = tl.reshape(_decode(words, tl.reshape(scale, (rows, 4 * count)), BEFORE_SM_89), (rows, 4, count, 8))
    return tl.reshape(tl.permute(x, (2, 1, 3, 0)), (32 * count, rows))


@triton.jit
def load_rows(
    codes_ptr, scales_ptr, rows, present, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BEFORE_SM_89: tl.constexpr
):  # fmt: skip
    """`unpack` of rows in memory, padded with zeros to 32 BLOCK_WORDS elements; rows not `present` (None: all) are zeros."""
    word, group = tl.arange(0, 4 * BLOCK_WORDS), tl.arange(0, 2 * BLOCK_WORDS)
    word_mask = rows[:, None] >= 0
    group_mask = word_mask
    if WORDS != BLOCK_WORDS:
        word_mask = word_mask & ((word % BLOCK_WORDS) < WORDS)[None, :]
        group_mask = group_mask & ((group % BLOCK_WORDS) < WORDS)[None, :]
        word = word // BLOCK_WORDS * WORDS + word % BLOCK_WORDS
        group = group // BLOCK_WORDS * WORDS + group % BLOCK_WORDS
    word_ptrs = codes_ptr.to(tl.pointer_type(tl.int32)) + rows[:, None] * (4 * WORDS) + word[None, :]
    group_ptrs = scales_ptr + rows[:, None] * (2 * WORDS) + group[None, :]
    if present is not None:
        words = tl.load(word_ptrs, mask=word_mask & present[:, None], other=0)
        scales = tl.load(group_ptrs, mask=group_mask & present[:, None], other=0)
    elif WORDS != BLOCK_WORDS:
        words = tl.load(word_ptrs, mask=word_mask, other=0)
        scales = tl.load(group_ptrs, mask=group_mask, other=0)
    else:
        words = tl.load(word_ptrs)
        scales = tl.load(group_ptrs)
    return unpack(words, scales, BEFORE_SM_89)


@triton.jit
def _fake_quantize_q(
    x, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr
):  # fmt: skip
    """Q float32 [ROWS, COLUMNS], zero behind the head dim, quantized and back: the bits are those of `quantize_rows`."""
    if ROTATE:
        x = hadamard(x, ROWS, COLUMNS)
        if HEAD_DIM < COLUMNS:  # a head dim of 16 is half of the tile: the other half of the product is not wanted
            x = tl.where((tl.arange(0, COLUMNS) < HEAD_DIM)[None, :], x, 0.0)
    groups = tl.reshape(x, (ROWS, COLUMNS // GROUP, GROUP))
    magnitude, scale, finite = round_groups(groups, 2, FOUR_OVER_SIX)
    return tl.reshape(signed_values(groups, magnitude, scale, finite), (ROWS, COLUMNS))


@triton.jit
def _online_softmax_step(scores, row_sum, row_max):
    """One step of the online softmax with ceiled maxima: P~, the factor of what came before, and the new state."""
    row_max_new = tl.maximum(row_max, tl.ceil(tl.max(scores, 1)))
    row_max_safe = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    p = tl.exp2(scores - row_max_safe[:, None])
    rescale = tl.exp2(row_max - row_max_safe)
    return p, rescale, row_sum * rescale + tl.sum(p, 1), row_max_new


@triton.jit
def _attend_kept(
    out, row_sum, row_max, q, q_pos, lower, start, stop,
    key_codes_ptr, key_scales_ptr, v_ptr, first_slot, ring_size, key_mask_ptr, softmax_scale_log2,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    BEFORE_SM_89: tl.constexpr,
):  # fmt: skip
    """Unquantized P~ times unquantized V over the keys from `start` to `stop`; a row may see those from `lower` to `q_pos`.

    V of key j is row (j + first_slot) % ring_size.
    """
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    for first_key in range(start, stop, GROUP):
        key = first_key + tl.arange(0, GROUP)
        present = key < stop
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask_ptr + key, mask=present, other=0) != 0)
        k = load_rows(key_codes_ptr, key_scales_ptr, key, present, WORDS, BLOCK_WORDS, BEFORE_SM_89)
        scores = dot(q, k, tl.zeros((q.shape[0], GROUP), tl.float32)) * softmax_scale_log2
        allowed = present[None, :] & (key[None, :] <= q_pos[:, None]) & (key[None, :] >= lower[:, None])
        p, rescale, row_sum, row_max = _online_softmax_step(tl.where(allowed, scores, float("-inf")), row_sum, row_max)
        v_mask = present[:, None] & (columns < HEAD_DIM)[None, :]
        v_row = (key + first_slot) % ring_size
        v = tl.load(v_ptr + v_row[:, None] * HEAD_DIM + columns[None, :], mask=v_mask, other=0.0)
        out = dot(cast_rn(p, v.dtype), v, out * rescale[:, None])
    return out, row_sum, row_max


@triton.jit(
    do_not_specialize=[
        "stride_b", "stride_h", "stride_l", "num_heads_k", "qheads_per_kvhead", "seqlen_new", "length", "num_blocks", "ring_size",
        "num_splits", "softmax_scale_log2", "k_shift_scale",
    ],
    do_not_specialize_on_alignment=["q_ptr", "k_shift_ptr", "key_mask_ptr"],
)  # fmt: skip
def split_kernel(
    q_ptr, k_shift_ptr, key_mask_ptr, leftpad_ptr,
    key_codes_ptr, key_scales_ptr, value_codes_ptr, value_scales_ptr, sink_ptr, recent_ptr, partials_ptr, lse_ptr,
    stride_b: tl.int64, stride_h: tl.int64, stride_l: tl.int64,
    num_heads_k, qheads_per_kvhead, seqlen_new, length, num_blocks, ring_size, num_splits, softmax_scale_log2, k_shift_scale,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_M: tl.constexpr, NEGATE: tl.constexpr,
    HAS_LEFTPAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_K_SHIFT: tl.constexpr, ROTATE: tl.constexpr,
    FOUR_OVER_SIX: tl.constexpr, ONE_TOKEN: tl.constexpr, BEFORE_SM_89: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (query heads of one key head, times new tokens) against one part of the keys; the last part: the kept groups.

    q [B, H, n, D] of any strides but the last, which is 1; k_shift float32 [Hk, D]; the cache as in `KVCache`, keys and values
    counted from `leftpad` int32 [B] (not HAS_LEFTPAD: 0), with room for `num_blocks` blocks of values and V of the last slots in
    a ring; key_mask uint8 [B, length] over slots. partials float32: of every part of every head [B, Hk, num_splits + 1] out
    [rows, D], not yet divided, and behind them all [2, rows]: m and the sum of P~. lse float32 [B, H, n]: if HAS_K_SHIFT, what
    the shift takes from it. NEGATE: the scale is negative. ONE_TOKEN: there is one new token, so every row sees the same keys.
    """
    batch_head, split, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, head_k = batch_head // num_heads_k, batch_head % num_heads_k
    leftpad = 0
    if HAS_LEFTPAD:
        leftpad = tl.load(leftpad_ptr + batch)
    if HAS_KEY_MASK:
        key_mask_ptr += batch * length + leftpad
    seqlen_k = length - leftpad
    rows_of_head = qheads_per_kvhead * seqlen_new
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < rows_of_head
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    valid = inside[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = rows[:, None] * HEAD_DIM + columns[None, :]
    q_ptr += batch * stride_b + head_k * qheads_per_kvhead * stride_h
    q_rows = (rows // seqlen_new).to(tl.int64) * stride_h + (rows % seqlen_new).to(tl.int64) * stride_l
    q = tl.load(q_ptr + q_rows[:, None] + columns[None, :], mask=valid, other=0.0).to(tl.float32)
    if HAS_K_SHIFT and split == num_splits:
        k_shift = tl.load(k_shift_ptr + head_k * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
        tl.store(lse_ptr + batch_head * rows_of_head + rows, tl.sum(q * k_shift[None, :], 1) * k_shift_scale, mask=inside)
    q = _fake_quantize_q(-q if NEGATE else q, BLOCK_M, 32 * BLOCK_WORDS, HEAD_DIM, ROTATE, FOUR_OVER_SIX).to(tl.float16)
    q_pos = seqlen_k - seqlen_new + rows % seqlen_new
    lower = q_pos & -GROUP
    capacity = num_blocks * BLOCK
    key_codes_ptr += batch_head * capacity * (16 * WORDS)
    key_scales_ptr += batch_head * capacity * (2 * WORDS)
    value_codes_ptr += batch_head * capacity * (HEAD_DIM // 2)
    value_scales_ptr += batch_head * capacity * (HEAD_DIM // GROUP)

    out = tl.zeros((BLOCK_M, 32 * BLOCK_WORDS), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    softmax_scale_log2 = softmax_scale_log2 / UNPACK_SCALE
    if split < num_splits:
        stop = tl.maximum((seqlen_k - 1) & -GROUP, 0)  # of the complete groups
        tiles = tl.cdiv(stop, BLOCK)
        part = tl.cdiv(tiles, num_splits)
        for tile in range(split * part, tl.minimum((split + 1) * part, tiles)):
            key = tile * BLOCK + tl.arange(0, BLOCK)
            k = load_rows(key_codes_ptr, key_scales_ptr, key, None, WORDS, BLOCK_WORDS, BEFORE_SM_89)
            scores = dot(q, k, tl.zeros((BLOCK_M, BLOCK), tl.float32)) * softmax_scale_log2
            allowed = (key >= GROUP) & (key < stop)
            if HAS_KEY_MASK:
                allowed = allowed & (tl.load(key_mask_ptr + key, mask=allowed, other=0) != 0)
            if ONE_TOKEN:
                scores = tl.where(allowed[None, :], scores, float("-inf"))
            else:
                scores = tl.where(allowed[None, :] & (key[None, :] < lower[:, None]), scores, float("-inf"))
            p, rescale, row_sum, row_max = _online_softmax_step(scores, row_sum, row_max)
            groups = tl.reshape(p, (BLOCK_M, BLOCK // GROUP, GROUP))
            groups = fake_quantize_p(groups, tl.max(groups, 2, keep_dims=True))
            p = tl.reshape(groups, (BLOCK_M, BLOCK)).to(tl.float16)
            present = None if HEAD_DIM == 32 * BLOCK_WORDS else columns < HEAD_DIM
            row = tile * HEAD_DIM + columns
            v = load_rows(value_codes_ptr, value_scales_ptr, row, present, BLOCK // 32, BLOCK // 32, BEFORE_SM_89)
            out = dot(p, v, out * rescale[:, None])
        out = out * (1.0 / (P_GLOBAL_SCALE * UNPACK_SCALE))
    else:
        sink_stop = tl.minimum(seqlen_k, GROUP)
        out, row_sum, row_max = _attend_kept(
            out, row_sum, row_max, q, q_pos, tl.zeros_like(q_pos), 0, sink_stop, key_codes_ptr, key_scales_ptr,
            sink_ptr + batch_head * GROUP * HEAD_DIM, 0, GROUP, key_mask_ptr, softmax_scale_log2,
            HEAD_DIM, WORDS, BLOCK_WORDS, HAS_KEY_MASK, BEFORE_SM_89,
        )  # fmt: skip
        open_start = tl.maximum((seqlen_k - seqlen_new) & -GROUP, GROUP)
        out, row_sum, row_max = _attend_kept(
            out, row_sum, row_max, q, q_pos, lower, open_start, seqlen_k, key_codes_ptr, key_scales_ptr,
            recent_ptr + batch_head * ring_size * HEAD_DIM, leftpad, ring_size, key_mask_ptr, softmax_scale_log2,
            HEAD_DIM, WORDS, BLOCK_WORDS, HAS_KEY_MASK, BEFORE_SM_89,
        )  # fmt: skip
    part = batch_head * (num_splits + 1) + split
    tl.store(partials_ptr + part * rows_of_head * HEAD_DIM + offsets, out, mask=valid)
    all_rows = tl.num_programs(0).to(tl.int64) * (num_splits + 1) * rows_of_head
    stats_ptr = partials_ptr + all_rows * HEAD_DIM + part * 2 * rows_of_head + rows
    tl.store(stats_ptr, row_max, mask=inside)
    tl.store(stats_ptr + rows_of_head, row_sum, mask=inside)


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_l", "num_heads_k", "qheads_per_kvhead", "seqlen_new", "num_parts"])
def combine_kernel(
    partials_ptr, out_ptr, lse_ptr,
    stride_b: tl.int64, stride_h: tl.int64, stride_l: tl.int64, num_heads_k, qheads_per_kvhead, seqlen_new, num_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, HAS_K_SHIFT: tl.constexpr,
):  # fmt: skip
    """One row of `split_kernel`: its parts, in order. out [B, H, n, D] of any strides but the last, which is 1."""
    rows_of_head = qheads_per_kvhead * seqlen_new
    row = tl.program_id(0) % rows_of_head
    batch_head = (tl.program_id(0) // rows_of_head).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    valid = columns < HEAD_DIM
    all_rows = tl.num_programs(0).to(tl.int64) * num_parts
    stats_ptr = partials_ptr + all_rows * HEAD_DIM + batch_head * num_parts * 2 * rows_of_head + row
    partials_ptr += (batch_head * num_parts * rows_of_head + row) * HEAD_DIM
    out = tl.zeros((BLOCK_D,), tl.float32)
    row_sum, row_max = 0.0, float("-inf")
    for start in range(0, num_parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        present = part < num_parts
        part_max = tl.load(stats_ptr + part * (2 * rows_of_head), mask=present, other=float("-inf"))
        part_sum = tl.load(stats_ptr + part * (2 * rows_of_head) + rows_of_head, mask=present, other=0.0)
        row_max_new = tl.maximum(row_max, tl.max(part_max, 0))
        row_max_safe = tl.where(row_max_new == float("-inf"), 0.0, row_max_new)
        part_rescale = tl.exp2(part_max - row_max_safe)  # powers of two: exact
        rescale = tl.exp2(row_max - row_max_safe)
        offsets = (part * rows_of_head)[:, None] * HEAD_DIM + columns[None, :]
        part_out = tl.load(partials_ptr + offsets, mask=present[:, None] & valid[None, :], other=0.0)
        out = out * rescale + tl.sum(part_out * part_rescale[:, None], 0)
        row_sum = row_sum * rescale + tl.sum(part_sum * part_rescale, 0)
        row_max = row_max_new
    empty = row_sum == 0.0
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
    lse_ptr += tl.program_id(0)  # rows of [B, H, n] are in the same order
    if HAS_K_SHIFT:
        lse += tl.load(lse_ptr)
    tl.store(lse_ptr, lse)
    out = cast_rn(out / tl.where(empty, 1.0, row_sum), out_ptr.dtype.element_ty)
    query_head = (batch_head % num_heads_k) * qheads_per_kvhead + row // seqlen_new
    out_ptr += batch_head // num_heads_k * stride_b + query_head * stride_h + (row % seqlen_new).to(tl.int64) * stride_l
    tl.store(out_ptr + columns, out, mask=valid)
