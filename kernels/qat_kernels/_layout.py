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

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._nvfp4 import GROUP

PAD = 128
"""Rows of a sequence are padded to a multiple of this, the largest tile."""
_PAD = tl.constexpr(PAD)


def order_of(keys: int) -> int:
    """ORDER for tiles of so many keys."""
    return min(keys, 64)


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
def sequence(cu_ptr, index, length, VARLEN: tl.constexpr):
    """The first token of a sequence, where tokens of all sequences lie behind one another, and the number of its tokens.

    cu int32 [n + 1] holds the bounds of packed sequences (VARLEN); without it every sequence has `length` tokens from 0 on.
    """
    start = 0
    if VARLEN:
        start = tl.load(cu_ptr + index)
        length = tl.load(cu_ptr + index + 1) - start
    return start, length


@triton.jit
def first_row(index, head, heads, rows, start, LEAD: tl.constexpr, VARLEN: tl.constexpr):
    """The first row of a sequence's head. `rows` are those of a head: of one sequence, or with VARLEN of all of them."""
    if VARLEN:
        extra: tl.constexpr = 1 if LEAD == 0 else 2
        return head * rows + (start // _PAD + index * extra) * _PAD
    return (index * heads + head) * rows


@triton.jit
def ranges(
    rows, start, offset, slots, LEAD: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """What BLOCK_M queries from `start` on, `rows`, see of `slots` slots, in tiles of BLOCK_N; query i has slot i + offset.

    Returns each query's own slot. Of the slots [begin, stop), which are quantized (or, with BF16 PV, just allowed): the end of
    what each query sees (upper), begin, the end of the tiles that all see whole (full), and stop. And where the tiles of open
    groups start, and how many they are.
    """
    own, own_first = rows + offset, start + offset
    own_last = tl.minimum(own_first + BLOCK_M, slots) - 1
    begin = 0
    open_start = 0
    open_blocks = 0
    if LEAD > 0:  # groups are kept
        begin = LEAD + GROUP
        upper = own & -GROUP
        stop = tl.maximum(own_last & -GROUP, begin)
        full = begin + tl.maximum((own_first & -GROUP) - begin, 0) // BLOCK_N * BLOCK_N
        open_start = tl.maximum(own_first & -GROUP, begin)
        open_start -= (open_start - begin) % BLOCK_N
        open_blocks = tl.cdiv(tl.maximum(own_last + 1 - open_start, 0), BLOCK_N)
    elif CAUSAL:
        upper = own + 1
        stop = tl.maximum(own_last + 1, 0)
        full = tl.maximum(own_first + 1, 0) // BLOCK_N * BLOCK_N
    else:
        upper = rows * 0 + slots
        stop = slots
        full = slots // BLOCK_N * BLOCK_N
    return own, upper, begin, full, stop, open_start, open_blocks


class Sequences(NamedTuple):
    """The sequences of one side, queries or keys: a batch of equal lengths, or packed ones."""

    count: int
    heads: int
    length: int
    """Tokens of a sequence; of the longest one where they are packed."""
    total: int
    """Tokens of a head of the tensor: `length`, or all of the packed ones."""
    cu: torch.Tensor | None = None
    """int32 [count + 1]: the bounds of packed sequences; None for a batch."""
    lead: int = 0
    """LEAD, which is PAD - 16 for keys where groups are kept."""

    @property
    def rows(self) -> int:
        """Operand rows of a head: of one sequence, or of all where they are packed (see `first_row`)."""
        if self.cu is not None:
            return (self.total // PAD + self.count * (2 if self.lead else 1)) * PAD
        return -(-(self.lead + self.length) // PAD) * PAD

    @property
    def all_rows(self) -> int:
        return self.rows * self.heads * (self.count if self.cu is None else 1)

    def blocks(self, size: int) -> int:
        """Blocks of `size` rows in the longest sequence."""
        return -(-(self.lead + self.length) // PAD) * PAD // size


def descriptors(operands, rows) -> list[TensorDescriptor | None]:
    """Tiles of `rows` rows of each operand, which the hardware can copy by itself."""
    return [x if x is None else TensorDescriptor.from_tensor(x, [n, x.shape[1]]) for x, n in zip(operands, rows, strict=True)]
