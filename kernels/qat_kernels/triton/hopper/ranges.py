"""Which tiles a block and its warp groups need: `layout.slot_ranges` and `scores.masked_slot_ranges` in whole tiles.

SEEN, what kernels are compiled for: None where queries see all keys, else WINDOW, BLOCK_SIZE and PREFIX of scores.py, and
BOUNDED: 1 where all sequences share their bounds, 2 where each has its own. CAUSAL: whether it is there. MASK: the same, but None
where a plain causal mask says all. A **sequence** is its number of queries and of slots, its leftpad, lower_ptr and upper_ptr.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qat_kernels.triton.layout import slot_ranges
from qat_kernels.triton.nvfp4 import GROUP
from qat_kernels.triton.scores import masked_slot_ranges

from .pipeline import WARP_GROUP_ROWS


@gluon.constexpr_function
def mask_of(seen):
    """MASK."""
    return None if seen is None or seen == (0, 1, 0, 0) else seen


@gluon.jit
def bounds_of(batch, lower_ptr, upper_ptr, seqlen_q, SEEN: gl.constexpr):
    """Pointers to the bounds of a sequence."""
    if SEEN[3] == 2:
        lower_ptr += batch.to(gl.int64) * seqlen_q
        upper_ptr += batch.to(gl.int64) * seqlen_q
    return lower_ptr, upper_ptr


@gluon.constexpr_function
def has_lower_bounds(mask):
    """Whether there are slots that some queries do not see any more."""
    return mask is not None and (mask[0] > 0 or mask[3] > 0)


@gluon.constexpr_function
def block_size_of(mask):
    """BLOCK_SIZE; 0: none."""
    return 0 if mask is None else mask[1]


@gluon.constexpr_function
def prefix_of(mask):
    """PREFIX; 0: none."""
    return 0 if mask is None else mask[2]


@gluon.constexpr_function
def is_wide(mask, columns):
    """Whether, of the tiles of so many slots that a warp group needs, those in which not all queries see the last slot begin
    behind the first slot of each query.
    """
    return mask is not None and not mask[3] and mask[0] >= WARP_GROUP_ROWS.value + columns + GROUP.value + mask[1]


@gluon.constexpr_function
def starts_early(seen):
    """Whether blocks of queries begin at a multiple of 64 slots, not of 64 queries: `rows_before`."""
    return seen is not None and not seen[3]


@gluon.jit
def rows_before(seqlen_q, slots, SEEN: gl.constexpr):
    """How many rows of the first block of queries are in front of the first query, below 64; they are not written.

    With them the last slots of 64 queries are those of one tile: fewer tiles are cut off, and the open groups are in one.
    """
    rows = 0
    if starts_early(SEEN):
        rows = (slots - seqlen_q) & (WARP_GROUP_ROWS - 1)
    return rows


@gluon.jit
def row_bounds(rows, sequence, LEAD: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr):
    """Of each of these queries the last slot, the end of the slots that are not kept, and the first slot; the prefix's end.

    Without MASK the last two are 0.
    """
    seqlen_q, slots, leftpad, lower_ptr, upper_ptr = sequence
    if MASK is None:
        last, upper, _, _, _, _, _ = slot_ranges(rows, 0, slots - seqlen_q, slots, LEAD, CAUSAL, 64, 64)
        lower = 0
        prefix_stop = 0
    else:
        last, upper, lower, prefix_stop, _, _, _, _, _, _, _, _ = masked_slot_ranges(
            rows, 0, seqlen_q, slots - seqlen_q, slots, leftpad, lower_ptr, upper_ptr,
            LEAD, MASK[0], MASK[1], MASK[2], MASK[3] > 0, 64, 64,
        )  # fmt: skip
    return last, upper, lower, prefix_stop


@gluon.jit
def tile_ranges(
    start, sequence, ROWS: gl.constexpr, N: gl.constexpr, LEAD: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr
):  # fmt: skip
    """What ROWS queries from `start` on see, in whole tiles of N slots.

    The end of the tiles that only the prefix needs. The first other tile, where those begin that all see whole, where they end,
    and the end of all. Where the tiles of open groups start and end; and whether the sink group is seen (0 or 1). Where all of
    the queries are behind the sequence, there is nothing but the sink group.
    """
    seqlen_q, slots, leftpad, lower_ptr, upper_ptr = sequence
    ORIGIN: gl.constexpr = LEAD + GROUP if LEAD > 0 else 0
    inside = start < seqlen_q
    if MASK is None:
        _, _, first, full, stop, open_start, open_blocks = slot_ranges(
            start, start, slots - seqlen_q, slots, LEAD, CAUSAL, ROWS, N
        )  # fmt: skip
        head_stop = first
        begin = first
        without_sink = 0
    else:
        start = gl.minimum(start, seqlen_q - 1)
        _, _, _, _, head_stop, first, begin, full, stop, open_start, without_sink, open_blocks = masked_slot_ranges(
            start, start, seqlen_q, slots - seqlen_q, slots, leftpad, lower_ptr, upper_ptr,
            LEAD, MASK[0], MASK[1], MASK[2], MASK[3] > 0, ROWS, N,
        )  # fmt: skip
        head_stop = gl.where(inside, head_stop, ORIGIN)
    stop = ORIGIN + gl.cdiv(gl.maximum(stop - ORIGIN, 0), N) * N
    open_stop = open_start + open_blocks * N
    stop, open_stop = gl.where(inside, stop, ORIGIN), gl.where(inside, open_stop, open_start)
    return head_stop, first, begin, full, stop, open_start, open_stop, 1 - without_sink
