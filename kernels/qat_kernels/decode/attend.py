"""Attention over the packed cache of cache.py in Triton: split over keys, then combined in a fixed order.

A program takes the query heads that share a key head as the rows of one tile, so that the cache is read once for all of them.
The reference is eager.py; the layout of the cache is that of byte_layout.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qat_kernels.triton.nvfp4 import (
    GROUP,
    P_GLOBAL_SCALE,
    cast_rn,
    dot,
    fake_quantize_p,
    hadamard,
    round_groups,
    signed_values,
)
from qat_kernels.triton.scores import LOG2_E

from .byte_layout import BLOCK_TOKENS
from .unpack import UNPACK_SCALE, load_rows, token_columns, unpack, unpack_tokens

LN_2 = tl.constexpr(0.6931471805599453)
BLOCK = tl.constexpr(BLOCK_TOKENS)
"""Tokens of a block of packed values."""
_EXPONENT_BITS = tl.constexpr(23)
"""Of a float32 the exponent stands above so many bits."""


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
def _scale_to_float16(x):
    """Q float32 [R, C] as float16, each row times a power of two that brings its largest value to 2^14 or just above; and what
    undoes it, float32 [R, 1].

    Values of bfloat16 and float16 stay as they are, unless they are less than 2^-28 of the largest.
    """
    # As integers, magnitudes have the same order, and unlike the maximum of floats this one keeps NaN.
    exponent = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1, keep_dims=True) >> _EXPONENT_BITS
    exponent = tl.minimum(tl.maximum(exponent, 15), 254)
    scale = ((268 - exponent) << _EXPONENT_BITS).to(tl.float32, bitcast=True)
    return (x * scale).to(tl.float16), ((exponent - 14) << _EXPONENT_BITS).to(tl.float32, bitcast=True)


@triton.jit
def _scores(q, k, scale_log2, softcap):
    """Scores times log2(e) of rows q and columns k; softcap None: they have no cap."""
    scores = dot(q, k, tl.zeros((q.shape[0], k.shape[1]), tl.float32)) * scale_log2
    if softcap is not None:  # tanh(x) = 1 - 2 / (1 + e^2x)
        scores = (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / softcap)))) * (softcap * LOG2_E)
    return scores


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
    key_codes_ptr, key_scales_ptr, ring, v_ptr, first_slot, ring_size, key_mask_ptr, scale_log2, softcap,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    BEFORE_SM_89: tl.constexpr,
):  # fmt: skip
    """Unquantized P~ times unquantized V over the keys from `start` to `stop`; a row may see those from `lower` to `q_pos`.

    K of key j is row j % ring (None: row j), and V is row (j + first_slot) % ring_size.
    """
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    for first_key in range(start, stop, GROUP):
        key = first_key + tl.arange(0, GROUP)
        present = key < stop
        if HAS_KEY_MASK:
            present = present & (tl.load(key_mask_ptr + key, mask=present, other=0) != 0)
        row = key
        if ring is not None:
            row = key % ring
        k = unpack(*load_rows(key_codes_ptr, key_scales_ptr, row, present, WORDS, BLOCK_WORDS), BEFORE_SM_89)
        scores = _scores(q, k, scale_log2, softcap)
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
        "num_splits", "softmax_scale_log2", "k_shift_scale", "window", "softcap",
    ],
    do_not_specialize_on_alignment=["q_ptr", "k_shift_ptr", "key_mask_ptr"],
)  # fmt: skip
def split_kernel(
    q_ptr, k_shift_ptr, key_mask_ptr, leftpad_ptr,
    key_codes_ptr, key_scales_ptr, value_codes_ptr, value_scales_ptr, sink_ptr, recent_ptr, partials_ptr, lse_ptr,
    stride_b: tl.int64, stride_h: tl.int64, stride_l: tl.int64,
    num_heads_k, qheads_per_kvhead, seqlen_new, length, num_blocks, ring_size, num_splits, softmax_scale_log2, k_shift_scale,
    window, softcap,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    NEGATE: tl.constexpr, HAS_LEFTPAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_K_SHIFT: tl.constexpr, ROTATE: tl.constexpr,
    FOUR_OVER_SIX: tl.constexpr, KV_ONLY: tl.constexpr, ONE_TOKEN: tl.constexpr, BEFORE_SM_89: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows (query heads of one key head, times new tokens) against one part of the keys; the last part: the kept groups.

    KV_ONLY: V lies as K does, Q and P~ are not quantized, and there are no kept groups, so no such part.

    q [B, H, n, D] of any strides but the last, which is 1; k_shift float32 [Hk, D]; the cache as in `KVCache`, keys and values
    counted from `leftpad` int32 [B] (not HAS_LEFTPAD: 0), with room for `num_blocks` blocks of values and V of the last slots in
    a ring; key_mask uint8 [B, length] over slots. partials float32: of every part of every head [B, Hk, num_parts] out
    [rows, D], not yet divided, and behind them all [2, rows]: m and the sum of P~. lse float32 [B, H, n]: if HAS_K_SHIFT, what
    the shift takes from it. NEGATE: the scale is negative. ONE_TOKEN: there is one new token, so every row sees the same keys.
    window: how many keys a row sees (None: all before it); the parts are of the tiles that are in a window, and the cache is a
    ring: token j is in the place of j % (num_blocks * BLOCK). softcap: or None.
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
    q = -q if NEGATE else q
    q_pos = seqlen_k - seqlen_new + rows % seqlen_new
    window_start = tl.zeros_like(q_pos)
    first_seen = 0
    if window is not None:
        window_start = tl.maximum(q_pos - (window - 1), 0)
        first_seen = tl.maximum(seqlen_k - seqlen_new - (window - 1), 0)
    capacity = num_blocks * BLOCK
    key_codes_ptr += batch_head * capacity * (16 * WORDS)
    key_scales_ptr += batch_head * capacity * (2 * WORDS)
    score_scale = softmax_scale_log2 / UNPACK_SCALE
    if KV_ONLY:
        q, undo = _scale_to_float16(q)
        score_scale = score_scale * undo
        value_codes_ptr += batch_head * capacity * (16 * WORDS)
        value_scales_ptr += batch_head * capacity * (2 * WORDS)
        num_parts = num_splits
        first, stop = 0, seqlen_k
        lower = q_pos + 1
    else:
        q = _fake_quantize_q(q, BLOCK_M, 32 * BLOCK_WORDS, HEAD_DIM, ROTATE, FOUR_OVER_SIX).to(tl.float16)
        value_codes_ptr += batch_head * capacity * (HEAD_DIM // 2)
        value_scales_ptr += batch_head * capacity * (HEAD_DIM // GROUP)
        num_parts = num_splits + 1
        first, stop = GROUP, tl.maximum((seqlen_k - 1) & -GROUP, 0)  # the complete groups but the first
        lower = q_pos & -GROUP

    out = tl.zeros((BLOCK_M, 32 * BLOCK_WORDS), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if split < num_splits:
        first = tl.maximum(first, first_seen)
        first_tile = first_seen // BLOCK_N
        tiles = tl.cdiv(stop, BLOCK_N)
        part = tl.cdiv(tiles - first_tile, num_splits)
        for tile in range(first_tile + split * part, tl.minimum(first_tile + (split + 1) * part, tiles)):
            key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            place = tile
            row = key
            if window is not None:
                place = tile % (capacity // BLOCK_N)
                row = place * BLOCK_N + tl.arange(0, BLOCK_N)
            k = unpack(*load_rows(key_codes_ptr, key_scales_ptr, row, None, WORDS, BLOCK_WORDS), BEFORE_SM_89)
            scores = _scores(q, k, score_scale, softcap)
            allowed = (key >= first) & (key < stop)
            if HAS_KEY_MASK:
                allowed = allowed & (tl.load(key_mask_ptr + key, mask=allowed, other=0) != 0)
            if ONE_TOKEN:
                scores = tl.where(allowed[None, :], scores, float("-inf"))
            else:
                seen = allowed[None, :] & (key[None, :] < lower[:, None])
                if window is not None:
                    seen = seen & (key[None, :] >= window_start[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            p, rescale, row_sum, row_max = _online_softmax_step(scores, row_sum, row_max)
            if KV_ONLY:
                # V is too small by UNPACK_SCALE; P~ is made too large by as much, and float16 holds more of the small ones.
                p = (p * (1.0 / UNPACK_SCALE)).to(tl.float16)
                present = key < stop
                if window is not None:
                    present = present & (key >= first)
                v = load_rows(value_codes_ptr, value_scales_ptr, row, present, WORDS, BLOCK_WORDS)
                v = unpack_tokens(*v, BEFORE_SM_89)  # `out` has its order of columns from now on
            else:
                # One block of values is one tile.
                groups = tl.reshape(p, (BLOCK_M, BLOCK_N // GROUP, GROUP))
                groups = fake_quantize_p(groups, tl.max(groups, 2, keep_dims=True))
                p = tl.reshape(groups, (BLOCK_M, BLOCK_N)).to(tl.float16)
                present = None if HEAD_DIM == 32 * BLOCK_WORDS else columns < HEAD_DIM
                row = place * HEAD_DIM + columns
                v = load_rows(value_codes_ptr, value_scales_ptr, row, present, BLOCK_N // 32, BLOCK_N // 32)
                v = unpack(*v, BEFORE_SM_89)
            out = dot(p, v, out * rescale[:, None])
        if not KV_ONLY:
            out = out * (1.0 / (P_GLOBAL_SCALE * UNPACK_SCALE))
    elif not KV_ONLY:
        ring = None if window is None else capacity
        sink_stop = tl.minimum(seqlen_k, GROUP)
        if window is not None:
            sink_stop = tl.where(first_seen < GROUP, sink_stop, 0)
        out, row_sum, row_max = _attend_kept(
            out, row_sum, row_max, q, q_pos, window_start, 0, sink_stop, key_codes_ptr, key_scales_ptr, ring,
            sink_ptr + batch_head * GROUP * HEAD_DIM, 0, GROUP, key_mask_ptr, score_scale, softcap,
            HEAD_DIM, WORDS, BLOCK_WORDS, HAS_KEY_MASK, BEFORE_SM_89,
        )  # fmt: skip
        open_start = tl.maximum((seqlen_k - seqlen_new) & -GROUP, GROUP)
        if window is not None:
            lower = tl.maximum(lower, window_start)
        out, row_sum, row_max = _attend_kept(
            out, row_sum, row_max, q, q_pos, lower, open_start, seqlen_k, key_codes_ptr, key_scales_ptr, ring,
            recent_ptr + batch_head * ring_size * HEAD_DIM, leftpad, ring_size, key_mask_ptr, score_scale, softcap,
            HEAD_DIM, WORDS, BLOCK_WORDS, HAS_KEY_MASK, BEFORE_SM_89,
        )  # fmt: skip
    if KV_ONLY:
        columns = token_columns(BLOCK_WORDS)
        valid = inside[:, None] & (columns < HEAD_DIM)[None, :]
        offsets = rows[:, None] * HEAD_DIM + columns[None, :]
    part = batch_head * num_parts + split
    tl.store(partials_ptr + part * rows_of_head * HEAD_DIM + offsets, out, mask=valid)
    all_rows = tl.num_programs(0).to(tl.int64) * num_parts * rows_of_head
    stats_ptr = partials_ptr + all_rows * HEAD_DIM + part * 2 * rows_of_head + rows
    tl.store(stats_ptr, row_max, mask=inside)
    tl.store(stats_ptr + rows_of_head, row_sum, mask=inside)


@triton.jit(
    do_not_specialize=["stride_b", "stride_h", "stride_l", "num_heads_k", "qheads_per_kvhead", "seqlen_new", "num_parts"],
    do_not_specialize_on_alignment=["sinks_ptr"],
)
def combine_kernel(
    partials_ptr, out_ptr, lse_ptr, sinks_ptr,
    stride_b: tl.int64, stride_h: tl.int64, stride_l: tl.int64, num_heads_k, qheads_per_kvhead, seqlen_new, num_parts,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, HAS_K_SHIFT: tl.constexpr,
):  # fmt: skip
    """One row of `split_kernel`: its parts, in order. out [B, H, n, D] of any strides but the last; sinks [H] or None."""
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
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + (batch_head % num_heads_k) * qheads_per_kvhead + row // seqlen_new).to(tl.float32) * LOG2_E
        row_max_new = tl.maximum(row_max, tl.ceil(sink))
        rescale = tl.exp2(row_max - row_max_new)
        out *= rescale
        row_sum = row_sum * rescale + tl.exp2(sink - row_max_new)
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
