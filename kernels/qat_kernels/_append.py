"""New tokens of the packed cache of kv_cache.py in Triton: K is quantized and stored, V where a group of 16 is complete."""

from __future__ import annotations

import triton
import triton.language as tl

from ._nvfp4 import GROUP, codes_of, hadamard, round_groups, scale_bits
from .kv_layout import BLOCK_SCALES

_GROUPS_OF_BLOCK = tl.constexpr(BLOCK_SCALES)
_SCANNED = tl.constexpr(1024)
"""Slots of the mask that are looked at in one step."""


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
def _first_allowed(mask_ptr, first, start, length):
    """`first` below `start`, where it is known; else the first allowed slot from there on, or `length`."""
    if first >= start:
        first = length
        block = start
        while (first == length) & (block < length):
            slot = block + tl.arange(0, _SCANNED)
            allowed = tl.load(mask_ptr + slot, mask=slot < length, other=0) != 0
            first = tl.min(tl.where(allowed, slot, length), 0)
            block += _SCANNED
    return first


@triton.jit(
    do_not_specialize=[
        "k_stride_b", "k_stride_h", "k_stride_l", "v_stride_b", "v_stride_h", "v_stride_l",
        "key_heads", "new", "length", "blocks", "ring",
    ],
    do_not_specialize_on_alignment=["k_ptr", "v_ptr", "shift_ptr", "mask_ptr"],
)  # fmt: skip
def append_kernel(
    k_ptr, v_ptr, shift_ptr, mask_ptr, first_ptr,
    key_codes_ptr, key_scales_ptr, value_codes_ptr, value_scales_ptr, sink_ptr, recent_ptr,
    k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_l: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_l: tl.int64,
    key_heads, new, length, blocks, ring,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, SHIFTED: tl.constexpr, ROTATE: tl.constexpr, FOUR_OVER_SIX: tl.constexpr,
):  # fmt: skip
    """One group of 16 tokens of one key head, counted from the group that the first new token falls into.

    k, v [B, Hk, n, D] of any strides but the last, which is 1; shift float32 [Hk, D]; mask uint8 [B, length] over slots; first
    int32 [B] (not ALIGNED: 0), brought up to date if MASKED; the cache as in `KVCache`, with room for `blocks` of values.

    recent [B, Hk, ring, D]: where groups are old and new, V of the slots before, and no new slot takes the place of one of them.
    """
    head = tl.program_id(0).to(tl.int64)
    batch, key_head = head // key_heads, head % key_heads
    start = length - new
    first = 0
    if ALIGNED:
        first = tl.load(first_ptr + batch)
    if MASKED:
        mask_ptr += batch * length
        # Other programs may have stored it already: then it is not below `start` either, and the same is found again.
        first = _first_allowed(mask_ptr, first, start, length)
        tl.store(first_ptr + batch, first)
    count = length - first
    group = tl.maximum(start - first, 0) // GROUP + tl.program_id(1)
    lane = tl.arange(0, GROUP)
    token = group * GROUP + lane
    slot = first + token
    fresh = (slot >= start) & (slot < length)
    present = fresh
    if MASKED:
        present = fresh & (tl.load(mask_ptr + slot, mask=fresh, other=0) != 0)
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    valid = columns < HEAD_DIM
    read = present[:, None] & valid[None, :]
    new_row = (slot - start).to(tl.int64)[:, None]

    k_ptr += batch * k_stride_b + key_head * k_stride_h
    k = tl.load(k_ptr + new_row * k_stride_l + columns[None, :], mask=read, other=0.0).to(tl.float32)
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
    rows = head * (blocks * (GROUP * _GROUPS_OF_BLOCK)) + token
    where = fresh[:, None] & ((byte % (4 * BLOCK_WORDS)) < 4 * WORDS)[None, :]
    tl.store(key_codes_ptr + rows[:, None] * (16 * WORDS) + place[None, :], packed, mask=where)
    scales = tl.permute(tl.reshape(scale_bits(scale, finite), (GROUP, BLOCK_WORDS, 2)), (0, 2, 1))
    index = tl.arange(0, 2 * BLOCK_WORDS)
    place = index // BLOCK_WORDS * WORDS + index % BLOCK_WORDS
    where = fresh[:, None] & ((index % BLOCK_WORDS) < WORDS)[None, :]
    scales = tl.reshape(scales, (GROUP, 2 * BLOCK_WORDS))
    tl.store(key_scales_ptr + rows[:, None] * (2 * WORDS) + place[None, :], scales, mask=where)

    v_ptr += batch * v_stride_b + key_head * v_stride_h
    v = tl.load(v_ptr + new_row * v_stride_l + columns[None, :], mask=read, other=0.0)
    recent_ptrs = recent_ptr + (head * ring + slot % ring)[:, None] * HEAD_DIM + columns[None, :]
    tl.store(recent_ptrs, v, mask=(fresh & (slot >= length - ring))[:, None] & valid[None, :])
    if group == 0:
        sink_ptr += head * GROUP * HEAD_DIM
        tl.store(sink_ptr + lane[:, None] * HEAD_DIM + columns[None, :], v, mask=fresh[:, None] & valid[None, :])
    elif (group + 1) * GROUP <= count:
        old = slot < start
        v = tl.where(old[:, None], tl.load(recent_ptrs, mask=old[:, None] & valid[None, :], other=0.0), v)
        first_row = head * blocks * HEAD_DIM
        _store_group(v.to(tl.float32), group, value_codes_ptr, value_scales_ptr, first_row, HEAD_DIM, FOUR_OVER_SIX)
