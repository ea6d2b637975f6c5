"""Device functions of what most calls leave out: bounds of what queries see, soft caps, key biases (docs/NUMERICS.md, 3, 4, 6).

MASKED kernels have bounds that are not simply causal. By number: WINDOW (0: none), BLOCK_SIZE, PREFIX; or BOUNDED, from tensors.
Slots are those of layout.py. Both bounds never decrease along the queries, so a tile of queries sees the slots from the lower
bound of its first to the upper bound of its last, besides the prefix, and no other tile of slots is visited; in the same way
a tile of slots is seen by a range of queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .nvfp4 import GROUP

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def soft_cap(scores, softmax_scale_log2, SOFTCAP: tl.constexpr):
    """tanh(x) of scores that are x = scores * scale / SOFTCAP; softmax_scale_log2: that scale times log2(e)."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(scores * (softmax_scale_log2 * (2.0 / SOFTCAP))))


@triton.jit
def add_key_bias(scores, key_bias):
    """scores + key_bias.

    As a fused multiply-add: Triton makes a plain sum the start of the matrix product, and then products wait for each other.
    """
    return tl.fma(scores, 1.0, key_bias)


@triton.jit
def seen_slots(
    query, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
    LEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The first and the last slot that queries see besides the prefix, which counts for the last one; a number or a tile."""
    if BOUNDED:
        lower = tl.load(lower_ptr + query) - leftpad + LEAD
        upper = tl.load(upper_ptr + query) - leftpad + LEAD
    else:
        upper = query + q_pos_offset
        if BLOCK_SIZE > 1:
            key = upper - LEAD
            upper = tl.where(key < 0, upper, (key // BLOCK_SIZE + 1) * BLOCK_SIZE - 1 + LEAD)
        lower = upper * 0
        if WINDOW > 0:
            lower = upper - (WINDOW - 1)
    upper = tl.minimum(upper, slots - 1)
    if PREFIX > 0:
        upper = tl.maximum(upper, tl.minimum(slots, PREFIX + LEAD) - 1)
    return lower, upper


@triton.jit
def masked_slot_ranges(
    rows, start, seqlen_q, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
    LEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`layout.slot_ranges` of MASKED kernels: what BLOCK_M queries from `start` on, `rows`, see, in tiles of BLOCK_N slots.

    The last slot of each query (last), the end of its slots that are not kept (upper), and its first slot (lower). The end of
    the prefix, and of the tiles that only the prefix needs (head_stop). Then begin and the end of the tiles from `first` on that
    not all see whole (begin), the end of those that all do (full), and stop; where the tiles of open groups start, and how many
    blocks of kept slots there are to the first one, 0 with the sink group or 1 without, and behind it.
    """
    lower, last = seen_slots(
        tl.minimum(rows, seqlen_q - 1), q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
        LEAD, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED,
    )  # fmt: skip
    lower_of_first, last_of_first = seen_slots(
        start, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr, LEAD, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED
    )  # fmt: skip
    lower_of_last, last_of_last = seen_slots(
        tl.minimum(start + BLOCK_M, seqlen_q) - 1, q_pos_offset, slots, leftpad, lower_ptr, upper_ptr,
        LEAD, WINDOW, BLOCK_SIZE, PREFIX, BOUNDED,
    )  # fmt: skip
    origin: tl.constexpr = LEAD + GROUP if LEAD > 0 else 0
    open_start = 0
    open_blocks = 0
    first_block = 0
    if LEAD > 0:  # groups are kept
        upper = last & -GROUP
        upper_of_first = last_of_first & -GROUP
        stop = tl.maximum(last_of_last & -GROUP, origin)
        open_start = tl.maximum(upper_of_first, origin)
        open_start -= (open_start - origin) % BLOCK_N
        open_blocks = tl.cdiv(tl.maximum(last_of_last + 1 - open_start, 0), BLOCK_N)
        first_block = tl.where((lower_of_first < origin) | (PREFIX > 0), 0, 1)
    else:
        upper = last + 1
        upper_of_first = last_of_first + 1
        stop = tl.maximum(last_of_last + 1, 0)
    # Tensors first: the interpreter of Triton 3.8 makes a constexpr of a constexpr plus a tensor.
    first = tl.maximum(lower_of_first - origin, 0) // BLOCK_N * BLOCK_N + origin
    begin = tl.cdiv(tl.maximum(lower_of_last - origin, 0), BLOCK_N) * BLOCK_N + origin
    full = tl.maximum(tl.maximum(upper_of_first - origin, 0) // BLOCK_N * BLOCK_N + origin, begin)
    prefix_stop = tl.minimum(slots, PREFIX + LEAD)
    head_stop = tl.minimum(tl.cdiv(tl.maximum(prefix_stop - origin, 0), BLOCK_N) * BLOCK_N + origin, first)
    return last, upper, lower, prefix_stop, head_stop, first, begin, full, stop, open_start, first_block, open_blocks


@triton.jit
def holds_an_open_group(last, first_slot, BLOCK_N: tl.constexpr):
    """Whether the open group of one of the queries, whose last slots are `last`, is in a tile."""
    group = last & -GROUP
    return tl.max(((group >= first_slot) & (group < first_slot + BLOCK_N)).to(tl.int32), 0) != 0


@triton.jit
def _count_below(values_ptr, count, limit):
    """How many of `count` numbers, at least one, that never decrease are below a limit; or below each of several."""
    found = limit * 0
    while count > 1:
        half = count // 2
        found = tl.where(tl.load(values_ptr + found + half - 1) < limit, found + half, found)
        count -= half
    return found + (tl.load(values_ptr + found) < limit).to(tl.int32)


@triton.jit
def first_query_to_see(
    slot, seqlen_q, q_pos_offset, slots, leftpad, upper_ptr,
    LEAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """The first query whose last slot is this one or behind it; seqlen_q if there is none."""
    if BOUNDED:
        query = _count_below(upper_ptr, seqlen_q, slot - LEAD + leftpad)
    else:
        key = tl.maximum(slot - LEAD, 0)
        query = tl.maximum(key // BLOCK_SIZE * BLOCK_SIZE + LEAD - q_pos_offset, 0)
    query = tl.where(slot < slots, tl.minimum(query, seqlen_q), seqlen_q)
    if PREFIX > 0:
        query = tl.where(slot < tl.minimum(slots, PREFIX + LEAD), 0, query)
    return query


@triton.jit
def queries_that_reach(
    slot, seqlen_q, q_pos_offset, leftpad, lower_ptr,
    LEAD: tl.constexpr, WINDOW: tl.constexpr, BLOCK_SIZE: tl.constexpr, PREFIX: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """How many queries have their lower bound at this slot or before it; all of them where it is in the prefix."""
    query = seqlen_q
    if BOUNDED:
        query = _count_below(lower_ptr, seqlen_q, slot - LEAD + leftpad + 1)
    elif WINDOW > 0:
        key = tl.maximum(slot - LEAD, 0) + WINDOW  # behind the last upper bound whose window has it
        query = tl.minimum(tl.maximum(key // BLOCK_SIZE * BLOCK_SIZE + LEAD - q_pos_offset, 0), seqlen_q)
    if PREFIX > 0:
        query = tl.where(slot < PREFIX + LEAD, seqlen_q, query)
    return query
