"""Where queries and keys lie in the operands that the Triton kernels read, which are made for them and thrown away.

An operand holds rows of one head after the other, for each sequence a multiple of PAD of them, padded with zeros, so that a
tile needs no bounds. Rows of Q and of dO are in the order of the queries. Rows of K and V are in **slots**:

* Slot = key + LEAD, where keys count from the first allowed one of their sequence. LEAD is 0, or PAD - 16 where groups are
  kept: then the sink group is the end of the first PAD slots and the other groups begin with a tile.
* For the forward, rows are permuted within each ORDER slots, 64 or 32. A thread of a matrix unit holds two neighbouring columns
  of every eight of its accumulator; the permutation makes these the scores of whole groups of 16 keys, or of half of one,
  so the largest of them, which sets the group's scale, is found within a thread, or two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qat_kernels import spec

from .nvfp4 import GROUP

PAD = 128
"""Rows of a sequence are padded to a multiple of this, the largest tile."""
_PAD = tl.constexpr(PAD)
SMOOTH_BLOCK = tl.constexpr(spec.SMOOTH_BLOCK)


@triton.jit
def slot_of(row, ORDER: tl.constexpr):
    """The slot whose row this is: among ORDER rows, row 8 j + 2 t + b belongs to register (j, b) of thread t of four.

    With ORDER = 0 rows are in the order of the slots.
    """
    if ORDER == 0:
        return row
    else:
        THREADS: tl.constexpr = 64 // ORDER  # that share a group
        place = row % ORDER
        thread = place // 2 % 4
        return row - place + thread // THREADS * GROUP + thread % THREADS * (ORDER // 4) + place // 8 * 2 + place % 2


@triton.jit
def row_of(slot, ORDER: tl.constexpr):
    """The inverse of `slot_of`."""
    if ORDER == 0:
        return slot
    else:
        THREADS: tl.constexpr = 64 // ORDER
        place = slot % ORDER
        register = place % (ORDER // 4)
        thread = place // GROUP * THREADS + place % GROUP // (ORDER // 4)
        return slot - place + register // 2 * 8 + thread * 2 + register % 2


@triton.jit
def to_groups(scores, ORDER: tl.constexpr):
    """A tile [M, N] of permuted columns with its groups along the axes 2, 4 and 5: [M, N / ORDER, j, group, thread, b].

    With ORDER = 0, of columns in their order: [M, N / 16, 16, 1, 1, 1].
    """
    if ORDER == 0:
        return tl.reshape(scores, (scores.shape[0], scores.shape[1] // GROUP, GROUP, 1, 1, 1))
    else:
        return tl.reshape(scores, (scores.shape[0], scores.shape[1] // ORDER, ORDER // 8, ORDER // 16, 64 // ORDER, 2))


@triton.jit
def to_tile(groups):
    """The inverse of `to_groups`."""
    columns: tl.constexpr = groups.shape[1] * groups.shape[2] * groups.shape[3] * groups.shape[4] * groups.shape[5]
    return tl.reshape(groups, (groups.shape[0], columns))


@triton.jit
def in_order(groups):
    """What `to_groups` cut, [M, N], with columns in the order of the slots. No value leaves its register."""
    return to_tile(tl.permute(groups, (0, 1, 3, 4, 2, 5)))


@triton.jit
def permuted(x, ORDER: tl.constexpr):
    """A tile [M, N] of columns in the order of the slots, with its columns permuted: the inverse of `in_order`."""
    if ORDER == 0:
        return x
    else:
        groups = tl.reshape(x, (x.shape[0], x.shape[1] // ORDER, ORDER // 16, 64 // ORDER, ORDER // 8, 2))
        return to_tile(tl.permute(groups, (0, 1, 4, 2, 3, 5)))


@triton.jit
def sequence(cu_seqlens_ptr, batch, seqlen, VARLEN: tl.constexpr):
    """The first token of a sequence, where tokens of all sequences lie behind one another, and the number of its tokens.

    cu_seqlens int32 [n + 1] holds the bounds of packed sequences (VARLEN); without it each has `seqlen` tokens from 0 on.
    """
    start = 0
    if VARLEN:
        start = tl.load(cu_seqlens_ptr + batch)
        seqlen = tl.load(cu_seqlens_ptr + batch + 1) - start
    return start, seqlen


@triton.jit
def first_row(batch, head, num_heads, rows, start, LEAD: tl.constexpr, VARLEN: tl.constexpr):
    """The first row of a sequence's head. `rows` are those of a head: of one sequence, or with VARLEN of all of them."""
    if VARLEN:
        extra: tl.constexpr = 1 if LEAD == 0 else 2
        return head * rows + (start // _PAD + batch * extra) * _PAD
    return (batch * num_heads + head) * rows


@triton.jit
def mean_scores_row(batch_head, row, seqlen_q):
    """The row of `smoothing.Smoothed.scores` that the queries from `row` on take; a tile lies in one block of 128."""
    return batch_head.to(tl.int64) * tl.cdiv(seqlen_q, SMOOTH_BLOCK) + row // SMOOTH_BLOCK


@triton.jit
def slot_ranges(
    rows, start, q_pos_offset, slots, LEAD: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What BLOCK_M queries from `start` on, `rows`, see of `slots` slots, in tiles of BLOCK_N.

    Query i is at slot i + q_pos_offset: q_pos, which is returned first. Of the slots [begin, stop), which are quantized (or, with
    BF16 PV, just allowed): the end of what each query sees (upper), begin, the end of the tiles that all see whole (full), and
    stop. And where the tiles of open groups start, and how many they are.
    """
    q_pos, first_q_pos = rows + q_pos_offset, start + q_pos_offset
    last_q_pos = tl.minimum(first_q_pos + BLOCK_M, slots) - 1
    begin = 0
    open_start = 0
    open_blocks = 0
    if LEAD > 0:  # groups are kept
        begin = LEAD + GROUP
        upper = q_pos & -GROUP
        stop = tl.maximum(last_q_pos & -GROUP, begin)
        full = begin + tl.maximum((first_q_pos & -GROUP) - begin, 0) // BLOCK_N * BLOCK_N
        open_start = tl.maximum(first_q_pos & -GROUP, begin)
        open_start -= (open_start - begin) % BLOCK_N
        open_blocks = tl.cdiv(tl.maximum(last_q_pos + 1 - open_start, 0), BLOCK_N)
    elif CAUSAL:
        upper = q_pos + 1
        stop = tl.maximum(last_q_pos + 1, 0)
        full = tl.maximum(first_q_pos + 1, 0) // BLOCK_N * BLOCK_N
    else:
        upper = rows * 0 + slots
        stop = slots
        full = slots // BLOCK_N * BLOCK_N
    return q_pos, upper, begin, full, stop, open_start, open_blocks
