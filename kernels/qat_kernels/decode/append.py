"""Triton kernel that adds new tokens to the packed cache of cache.py. It quantizes and stores K, and V of complete groups of 16.

With groups of V along the head dim (KV_ONLY), V is stored like K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from qat_kernels.triton.nvfp4 import GROUP, ROTATION_GAIN, e2m1_codes, e4m3_bits, hadamard, round_groups

from .byte_layout import BLOCK_SCALES

_GROUPS_OF_BLOCK = tl.constexpr(BLOCK_SCALES)
_SCANNED = tl.constexpr(1024)
"""Slots of the mask that are looked at in one step."""


@triton.jit
def _byte(first, second):
    """Two codes, int32, in one byte, in the layout of byte_layout.py."""
    return (((first & 7) << 1) | ((first & 8) << 4) | ((second & 7) << 4) | (second >> 3)).to(tl.uint8)


@triton.jit
def _store_tokens(
    x, codes_ptr, scales_ptr, rows, stored, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr, FOUR_OVER_SIX: tl.constexpr,
    RECIPROCAL: tl.constexpr,
):  # fmt: skip
    """Quantize x float32 [16, 32 BLOCK_WORDS], one token a row, along the head dim into `rows`, where they are `stored`."""
    groups = tl.reshape(x, (GROUP, 2 * BLOCK_WORDS, GROUP))
    magnitude, scale, finite = round_groups(groups, 2, FOUR_OVER_SIX, RECIPROCAL)
    bits = e4m3_bits(scale, finite)  # before the codes: else Triton 3.8 spills it on sm_80
    # From (i, t, half, pair, element) to (t, i, element, half), two pairs a byte.
    codes = tl.reshape(e2m1_codes(groups, magnitude, finite), (GROUP, BLOCK_WORDS, 4, 2, 2, 2))
    first, second = tl.split(tl.permute(codes, (0, 2, 1, 5, 3, 4)))
    packed = tl.reshape(_byte(first, second), (GROUP, 16 * BLOCK_WORDS))
    byte = tl.arange(0, 16 * BLOCK_WORDS)
    place = byte // (4 * BLOCK_WORDS) * (4 * WORDS) + byte % (4 * BLOCK_WORDS)
    where = stored[:, None] & ((byte % (4 * BLOCK_WORDS)) < 4 * WORDS)[None, :]
    tl.store(codes_ptr + rows[:, None] * (16 * WORDS) + place[None, :], packed, mask=where)
    scales = tl.permute(tl.reshape(bits, (GROUP, BLOCK_WORDS, 2)), (0, 2, 1))
    index = tl.arange(0, 2 * BLOCK_WORDS)
    place = index // BLOCK_WORDS * WORDS + index % BLOCK_WORDS
    where = stored[:, None] & ((index % BLOCK_WORDS) < WORDS)[None, :]
    scales = tl.reshape(scales, (GROUP, 2 * BLOCK_WORDS))
    tl.store(scales_ptr + rows[:, None] * (2 * WORDS) + place[None, :], scales, mask=where)


@triton.jit
def _store_group(
    v, group, codes_ptr, scales_ptr, first_row, HEAD_DIM: tl.constexpr, FOUR_OVER_SIX: tl.constexpr
):  # fmt: skip
    """Quantize v float32 [16, D], the values of a whole group, into its place in the block that begins `first_row` rows on."""
    columns = tl.arange(0, v.shape[1])
    magnitude, scale, finite = round_groups(v[None, :, :], 1, FOUR_OVER_SIX)
    # From (lane of the group, half, pair, element, column) to (column, lane, element, half).
    codes = tl.reshape(e2m1_codes(v[None, :, :], magnitude, finite), (2, 2, 2, 2, v.shape[1]))
    first, second = tl.split(tl.permute(codes, (4, 0, 3, 1, 2)))
    packed = tl.reshape(_byte(first, second), (v.shape[1], 8))
    block, half, word = group // _GROUPS_OF_BLOCK, group % 2, group % _GROUPS_OF_BLOCK // 2
    rows = first_row + block * HEAD_DIM + columns
    byte = tl.arange(0, 8)
    place = (2 * half + byte // 4) * (2 * _GROUPS_OF_BLOCK) + 4 * word + byte % 4
    where = (columns < HEAD_DIM)[:, None] & (byte >= 0)[None, :]
    tl.store(codes_ptr + rows[:, None] * (8 * _GROUPS_OF_BLOCK) + place[None, :], packed, mask=where)
    bits = tl.reshape(e4m3_bits(scale, finite), (v.shape[1],))
    place = half * (_GROUPS_OF_BLOCK // 2) + word
    tl.store(scales_ptr + rows * _GROUPS_OF_BLOCK + place, bits, mask=columns < HEAD_DIM)


@triton.jit
def _find_leftpad(key_mask_ptr, leftpad, start, length):
    """`leftpad` if it is below `start`, so known already; else the first allowed slot from `start` on, or `length`."""
    if leftpad >= start:
        leftpad = length
        block = start
        while (leftpad == length) & (block < length):
            slot = block + tl.arange(0, _SCANNED)
            allowed = tl.load(key_mask_ptr + slot, mask=slot < length, other=0) != 0
            leftpad = tl.min(tl.where(allowed, slot, length), 0)
            block += _SCANNED
    return leftpad


@triton.jit(
    do_not_specialize=[
        "k_stride_b", "k_stride_h", "k_stride_l", "v_stride_b", "v_stride_h", "v_stride_l",
        "num_heads_k", "seqlen_new", "length", "num_blocks", "ring_size",
    ],
    do_not_specialize_on_alignment=["k_ptr", "v_ptr", "k_shift_ptr", "q_shift_ptr", "key_mask_ptr"],
)  # fmt: skip
def append_kernel(
    k_ptr, v_ptr, k_shift_ptr, q_shift_ptr, key_mask_ptr, leftpad_ptr,
    key_codes_ptr, key_scales_ptr, key_bias_ptr, value_codes_ptr, value_scales_ptr, sink_ptr, recent_ptr,
    k_stride_b: tl.int64, k_stride_h: tl.int64, k_stride_l: tl.int64,
    v_stride_b: tl.int64, v_stride_h: tl.int64, v_stride_l: tl.int64,
    num_heads_k, seqlen_new, length, num_blocks, ring_size,
    HEAD_DIM: tl.constexpr, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    HAS_LEFTPAD: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_K_SHIFT: tl.constexpr, ROTATE: tl.constexpr,
    FOUR_OVER_SIX: tl.constexpr, KV_ONLY: tl.constexpr, RING: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One group of 16 tokens of one key head, counted from the group that the first new token falls into.

    k, v [B, Hk, n, D] of any strides but the last, which is 1; k_shift and q_shift float32 [Hk, D] (q_shift None: there is no key
    bias); key_mask uint8 [B, length] over slots; leftpad int32 [B] (not HAS_LEFTPAD: 0), brought up to date if HAS_KEY_MASK; the
    cache as in `CacheTensors`, with room for `num_blocks` blocks of tokens.

    recent [B, Hk, ring_size, D]: for a group with old and new tokens it holds V of the old ones, and no new slot overwrites them.

    RING: there may be more tokens than room. Token j is stored in place j % (num_blocks * BLOCK), unless a later token is.

    KV_ONLY: V is stored as K is, its scales by the reciprocal rule as those of K are; there is no sink and no ring.

    DEPENDENT: `split_kernel` may begin while this runs.
    """
    if DEPENDENT:
        gdc_launch_dependents()
    batch_head = tl.program_id(0).to(tl.int64)
    batch, head_k = batch_head // num_heads_k, batch_head % num_heads_k
    start = length - seqlen_new
    leftpad = 0
    if HAS_LEFTPAD:
        leftpad = tl.load(leftpad_ptr + batch)
    if HAS_KEY_MASK:
        key_mask_ptr += batch * length
        # Another program may have stored it already. Then it is not below `start` either, and the same value is found again.
        leftpad = _find_leftpad(key_mask_ptr, leftpad, start, length)
        tl.store(leftpad_ptr + batch, leftpad)
    seqlen_k = length - leftpad
    group = tl.maximum(start - leftpad, 0) // GROUP + tl.program_id(1)
    lane = tl.arange(0, GROUP)
    token = group * GROUP + lane
    slot = leftpad + token
    is_new = (slot >= start) & (slot < length)
    present = is_new
    if HAS_KEY_MASK:
        present = is_new & (tl.load(key_mask_ptr + slot, mask=is_new, other=0) != 0)
    columns = tl.arange(0, 32 * BLOCK_WORDS)
    valid = columns < HEAD_DIM
    read = present[:, None] & valid[None, :]
    new_row = (slot - start).to(tl.int64)[:, None]

    k_ptr += batch * k_stride_b + head_k * k_stride_h
    k = tl.load(k_ptr + new_row * k_stride_l + columns[None, :], mask=read, other=0.0).to(tl.float32)
    if HAS_K_SHIFT:
        k = k - tl.load(k_shift_ptr + head_k * HEAD_DIM + columns, mask=valid, other=0.0)[None, :]
    key_bias = None
    if q_shift_ptr is not None:
        q_shift = tl.load(q_shift_ptr + head_k * HEAD_DIM + columns, mask=valid, other=0.0)
        key_bias = tl.sum(k * q_shift[None, :], 1)
        if ROTATE:
            key_bias = key_bias * (HEAD_DIM * ROTATION_GAIN)
    if ROTATE:
        # A head dim of 16 is half of the tile; the other half of the product must be zero.
        k = tl.where(valid[None, :], hadamard(k, GROUP, 32 * BLOCK_WORDS), 0.0)
    capacity = num_blocks * (GROUP * _GROUPS_OF_BLOCK)
    rows = batch_head * capacity + token
    stored = is_new
    if RING:
        rows = batch_head * capacity + token % capacity
        stored = is_new & (token + capacity >= seqlen_k)
    _store_tokens(k, key_codes_ptr, key_scales_ptr, rows, stored, WORDS, BLOCK_WORDS, FOUR_OVER_SIX, KV_ONLY)
    if key_bias is not None:
        tl.store(key_bias_ptr + rows, key_bias, mask=stored)

    v_ptr += batch * v_stride_b + head_k * v_stride_h
    v = tl.load(v_ptr + new_row * v_stride_l + columns[None, :], mask=read, other=0.0)
    if KV_ONLY:
        v = v.to(tl.float32)
        _store_tokens(v, value_codes_ptr, value_scales_ptr, rows, stored, WORDS, BLOCK_WORDS, FOUR_OVER_SIX, KV_ONLY)
    else:
        recent_ptrs = recent_ptr + (batch_head * ring_size + slot % ring_size)[:, None] * HEAD_DIM + columns[None, :]
        tl.store(recent_ptrs, v, mask=(is_new & (slot >= length - ring_size))[:, None] & valid[None, :])
        if group == 0:
            sink_ptr += batch_head * GROUP * HEAD_DIM
            tl.store(sink_ptr + lane[:, None] * HEAD_DIM + columns[None, :], v, mask=is_new[:, None] & valid[None, :])
        elif (group + 1) * GROUP <= seqlen_k:
            before = slot < start
            v = tl.where(before[:, None], tl.load(recent_ptrs, mask=before[:, None] & valid[None, :], other=0.0), v)
            first_row = batch_head * num_blocks * HEAD_DIM
            if RING:
                # Only if no later complete group has this place.
                if (group + 1) * GROUP + capacity > seqlen_k:
                    place = group % (num_blocks * _GROUPS_OF_BLOCK)
                    _store_group(v.to(tl.float32), place, value_codes_ptr, value_scales_ptr, first_row, HEAD_DIM, FOUR_OVER_SIX)
            else:
                _store_group(v.to(tl.float32), group, value_codes_ptr, value_scales_ptr, first_row, HEAD_DIM, FOUR_OVER_SIX)
