"""New tokens of the packed cache of kv_cache.py in Triton: K is quantized and stored, V where a group of 16 is complete."""

from __future__ import annotations

import triton
import triton.language as tl

from ._nvfp4 import GROUP, codes_of, hadamard, round_groups, scale_bits
from .kv_layout import BLOCK_SCALES

_GROUPS_OF_BLOCK = tl.constexpr(BLOCK_SCALES)


@triton.jit
def _store_group(
    v, group, codes_ptr, scales_ptr, first_row, HEAD_DIM: tl.constexpr, FOUR_OVER_SIX: tl.constexpr
):  # fmt: skip
    """Quantize v float32 [16, D], the values of a whole group, into its place in the block that begins `first_row` rows on."""
    columns = tl.arange(0, v.shape[1])
    magnitude, scale, finite = round_groups(v[None, :, :], 1, FOUR_OVER_SIX)
    # From (lane of the group, half, pair, element, column) to (column, lane, element, half).
    codes = tl.reshape(codes_of(v[None, :, :], magnitude, finite), (2, 2, 2, 2, v.shape[1]))
    low, high = tl.split(tl.permute(codes, (4, 0, 3, 1, 2)))
    packed = tl.reshape((low | (high << 4)).to(tl.uint8), (v.shape[1], 8))
    block, half, word = group // _GROUPS_OF_BLOCK, group % 2, group % _GROUPS_OF_BLOCK // 2
    rows = first_row + block * HEAD_DIM + columns
    byte = tl.arange(0, 8)
    place = (2 * half + byte // 4) * (2 * _GROUPS_OF_BLOCK) + 4 * word + byte % 4
    where = (columns < HEAD_DIM)[:, None] & (byte >= 0)[None, :]
    tl.store(codes_ptr + rows[:, None] * (8 * _GROUPS_OF_BLOCK) + place[None, :], packed, mask=where)
    bits = tl.reshape(scale_bits(scale, finite), (v.shape[1],))
    place = half * (_GROUPS_OF_BLOCK // 2) + word
    tl.store(scales_ptr + rows * _GROUPS_OF_BLOCK + place, bits, mask=columns < HEAD_DIM)


@triton.jit
def append_kernel(
    k_ptr, recent_ptr, shift_ptr, mask_ptr, first_ptr,
    key_codes_ptr, key_scales_ptr, value_codes_ptr, value_scales_ptr, sink_ptr,
    stride_b, stride_h, stride_l, stride_d,
    key_heads, new, length, capacity, recent,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, SHIFTED: tl.constexpr, ROTATE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr,
):  # fmt: skip
    """One group of 16 tokens of one key head, counted from the group that the first new token falls into.

    k [B, Hk, n, D] of any strides; recent [B, Hk, recent, D]: V of the last slots, the new ones among them, 0 where excluded;
    shift float32 [Hk, D]; mask uint8 [B, length] over slots; first int32 [B] (not ALIGNED: 0).
    """
    head = tl.program_id(0).to(tl.int64)
    batch, key_head = head // key_heads, head % key_heads
    first = 0
    if ALIGNED:
        first = tl.load(first_ptr + batch)
    count, start = length - first, length - new
    group = tl.maximum(start - first, 0) // GROUP + tl.program_id(1)
    lane = tl.arange(0, GROUP)
    token = group * GROUP + lane
    slot = first + token
    fresh = (slot >= start) & (slot < length)
    present = fresh
    if MASKED:
        present = fresh & (tl.load(mask_ptr + batch * length + slot, mask=fresh, other=0) != 0)
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    valid = columns < HEAD_DIM

    k_ptr += batch * stride_b + key_head * stride_h
    offsets = (slot - start).to(tl.int64)[:, None] * stride_l + columns.to(tl.int64)[None, :] * stride_d
    k = tl.load(k_ptr + offsets, mask=present[:, None] & valid[None, :], other=0.0).to(tl.float32)
    if SHIFTED:
        k = k - tl.load(shift_ptr + key_head * HEAD_DIM + columns, mask=valid, other=0.0)[None, :]
    if ROTATE:
        # A head dim of 16 is half of the tile: the other half of the product is not wanted.
        k = tl.where(valid[None, :], hadamard(k, GROUP, 32 * BLOCK_WORDS), 0.0)
    groups = tl.reshape(k, (GROUP, 2 * BLOCK_WORDS, GROUP))
    magnitude, scale, finite = round_groups(groups, 2, FOUR_OVER_SIX)
    # From (i, t, half, pair, element) to (t, i, element, half), two pairs a byte.
    codes = tl.reshape(codes_of(groups, magnitude, finite), (GROUP, BLOCK_WORDS, 4, 2, 2, 2))
    low, high = tl.split(tl.permute(codes, (0, 2, 1, 5, 3, 4)))
    packed = tl.reshape((low | (high << 4)).to(tl.uint8), (GROUP, 16 * BLOCK_WORDS))
    byte = tl.arange(0, 16 * BLOCK_WORDS)
    place = byte // (4 * BLOCK_WORDS) * (4 * WORDS) + byte % (4 * BLOCK_WORDS)
    rows = head * capacity + token
    where = fresh[:, None] & ((byte % (4 * BLOCK_WORDS)) < 4 * WORDS)[None, :]
    tl.store(key_codes_ptr + rows[:, None] * (16 * WORDS) + place[None, :], packed, mask=where)
    scales = tl.permute(tl.reshape(scale_bits(scale, finite), (GROUP, BLOCK_WORDS, 2)), (0, 2, 1))
    index = tl.arange(0, 2 * BLOCK_WORDS)
    place = index // BLOCK_WORDS * WORDS + index % BLOCK_WORDS
    where = fresh[:, None] & ((index % BLOCK_WORDS) < WORDS)[None, :]
    scales = tl.reshape(scales, (GROUP, 2 * BLOCK_WORDS))
    tl.store(key_scales_ptr + rows[:, None] * (2 * WORDS) + place[None, :], scales, mask=where)

    recent_ptr += head * recent * HEAD_DIM
    known = (slot >= length - recent) & (slot < length)
    offsets = (slot - (length - recent))[:, None] * HEAD_DIM + columns[None, :]
    v = tl.load(recent_ptr + offsets, mask=known[:, None] & valid[None, :], other=0.0)
    if group == 0:
        sink_ptr += head * GROUP * HEAD_DIM
        tl.store(sink_ptr + lane[:, None] * HEAD_DIM + columns[None, :], v, mask=fresh[:, None] & valid[None, :])
    elif (group + 1) * GROUP <= count:
        first_row = head * (capacity // (GROUP * _GROUPS_OF_BLOCK)) * HEAD_DIM
        _store_group(v.to(tl.float32), group, value_codes_ptr, value_scales_ptr, first_row, HEAD_DIM, FOUR_OVER_SIX)
