"""dK and dV on Hopper (docs/NUMERICS.md, section 5): the sums of the kernel in triton/grad_key_value.py.

A block is two warp groups of 64 slots each of one key head, and a warp that copies tiles of Q and dO, with their row
statistics, ahead of them. Scores are [slots, queries]: a warp has the 16 rows of one group. Two tiles are one step of the loop:
the products of the first run beside the scores of the second. P and dS are operands from registers. Kept groups come last, one
tile a step; each warp group takes only the tiles whose queries see its own slots there.

The order of the sums, and so the bits, are those of triton/grad_key_value.py with tiles of 128 slots and a plain mask, or
without a causal mask; else they are the same where no query heads share a key head.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qat_kernels.spec import P_GLOBAL_SCALE
from qat_kernels.triton.layout import PAD, first_row, sequence
from qat_kernels.triton.nvfp4 import GROUP
from qat_kernels.triton.scores import first_query_to_see, queries_that_reach

from .pipeline import WARP_GROUP_ROWS, accumulator, left_operand, new_barriers, place
from .ranges import bounds_of, has_lower_bounds, mask_of
from .rotation import rotate_back
from .rounding import quantize_p_along_rows

_PAD = gl.constexpr(PAD)
_WARP_GROUPS = gl.constexpr(2)
_ROWS = gl.constexpr(_WARP_GROUPS.value * WARP_GROUP_ROWS.value)
"""Slots of a block."""
_TILE = gl.constexpr(64)
"""Queries of a tile."""
_PAIR = gl.constexpr(2)
_NEVER = gl.constexpr(2**30)
"""Behind every query."""
_INV_P_GLOBAL_SCALE = gl.constexpr(1 / P_GLOBAL_SCALE)


@gluon.jit
def _query_ranges(
    first_slot, seqlen_q, slots, LEAD: gl.constexpr, CAUSAL: gl.constexpr, HAS_KEY_MASK: gl.constexpr
):  # fmt: skip
    """Of the block of slots from `first_slot` on: the tiles of queries that see some of them (begin to full), and those that
    see all (full to stop). Both are whole tiles.
    """
    until = gl.cdiv(seqlen_q, _TILE) * _TILE
    first_query = first_slot - (slots - seqlen_q)  # the one at the first slot
    begin = 0
    full = 0
    if LEAD > 0:
        begin = gl.maximum(first_query + GROUP, 0) // _TILE * _TILE
        full = first_query + _ROWS
    elif CAUSAL:
        begin = gl.maximum(first_query, 0) // _TILE * _TILE
        full = first_query + _ROWS - 1
    full = gl.where(slots < first_slot + _ROWS, until, full)
    if HAS_KEY_MASK:
        full = until
    full = gl.minimum(begin + gl.cdiv(gl.maximum(full - begin, 0), _TILE) * _TILE, gl.maximum(until, begin))
    nothing = (first_slot >= slots) | (first_slot < LEAD)  # or the block of the sink group, which is kept
    begin = gl.where(nothing, until, begin)
    full = gl.where(nothing, begin, full)
    return begin, full, gl.where(nothing, begin, gl.maximum(until, full))


@gluon.jit
def _masked_query_ranges(
    first_slot, sequence, LEAD: gl.constexpr, MASK: gl.constexpr, HAS_KEY_MASK: gl.constexpr
):  # fmt: skip
    """`_query_ranges` with MASK. Tiles of queries that see all end before those that only see slots behind the first (late)."""
    seqlen_q, slots, leftpad, lower_ptr, upper_ptr = sequence
    q_pos_offset = slots - seqlen_q
    until = _last_query(first_slot, sequence, _ROWS, LEAD, MASK)
    late = queries_that_reach(first_slot, seqlen_q, q_pos_offset, leftpad, lower_ptr, LEAD, MASK[0], MASK[1], 0, MASK[3] > 0)
    begin = first_query_to_see(
        first_slot + (GROUP if LEAD > 0 else 0), seqlen_q, q_pos_offset, slots, leftpad, upper_ptr,
        LEAD, MASK[1], MASK[2], MASK[3] > 0,
    ) // GROUP * GROUP  # fmt: skip
    full = first_query_to_see(
        first_slot + _ROWS - (0 if LEAD > 0 else 1), seqlen_q, q_pos_offset, slots, leftpad, upper_ptr,
        LEAD, MASK[1], MASK[2], MASK[3] > 0,
    )  # fmt: skip
    full = seqlen_q if HAS_KEY_MASK else gl.where(slots < first_slot + _ROWS, seqlen_q, full)
    nothing = (first_slot >= slots) | (first_slot < LEAD)  # or the block of the sink group, which is kept
    until = gl.where(nothing, begin, until)
    # None lies behind the tiles of the sequence.
    begin = gl.minimum(begin, (gl.cdiv(seqlen_q, _TILE) - gl.cdiv(gl.maximum(until - begin, 0), _TILE)) * _TILE)
    full = begin + gl.cdiv(gl.maximum(gl.minimum(full, until) - begin, 0), _TILE) * _TILE
    late = full + gl.maximum(gl.minimum(late, until) - full, 0) // _TILE * _TILE
    return begin, full, late, late + gl.cdiv(gl.maximum(until - late, 0), _TILE) * _TILE


@gluon.jit
def _last_query(first_slot, sequence, ROWS: gl.constexpr, LEAD: gl.constexpr, MASK: gl.constexpr):
    """The end of the queries that see some of ROWS slots from `first_slot` on, by their lower bounds."""
    seqlen_q, slots, leftpad, lower_ptr, _ = sequence
    until = queries_that_reach(
        gl.minimum(first_slot + ROWS, slots) - 1, seqlen_q, slots - seqlen_q, leftpad, lower_ptr,
        LEAD, MASK[0], MASK[1], MASK[2], MASK[3] > 0,
    )  # fmt: skip
    if MASK[2] > 0:
        until = gl.where(first_slot < MASK[2] + LEAD, seqlen_q, until)
    return until


@gluon.jit
def _kept_range(first_slot, sequence, ROWS: gl.constexpr, LEAD: gl.constexpr, MASK: gl.constexpr):
    """The queries that see ROWS slots from `first_slot` on in kept groups: in their own groups, or in the sink group."""
    seqlen_q, slots, leftpad, _, upper_ptr = sequence
    q_pos_offset = slots - seqlen_q
    if MASK is None:
        until = seqlen_q
        start = gl.minimum(gl.maximum(gl.maximum(first_slot, LEAD) - q_pos_offset, 0), seqlen_q)
        stop = gl.maximum(first_slot + ROWS - q_pos_offset, 0)
    else:
        until = _last_query(first_slot, sequence, ROWS, LEAD, MASK)
        start = first_query_to_see(
            gl.maximum(first_slot, LEAD), seqlen_q, q_pos_offset, slots, leftpad, upper_ptr, LEAD, MASK[1], MASK[2], MASK[3] > 0
        )  # fmt: skip
        stop = first_query_to_see(
            first_slot + ROWS, seqlen_q, q_pos_offset, slots, leftpad, upper_ptr, LEAD, MASK[1], MASK[2], MASK[3] > 0
        )  # fmt: skip
    stop = gl.where(first_slot < LEAD, until, gl.minimum(stop, until))
    nothing = (first_slot >= slots) | (first_slot + ROWS <= LEAD)
    return start, gl.where(nothing, start, gl.maximum(start, stop))


@gluon.jit
def _kept_tiles(first_slot, sequence, LEAD: gl.constexpr, MASK: gl.constexpr):
    """Where the tiles of `_kept_range` start, at a multiple of 16 as all sums over queries, and where they end.

    None lies behind the tiles of the sequence.
    """
    start, stop = _kept_range(first_slot, sequence, _ROWS, LEAD, MASK)
    count = gl.where(stop > start, gl.cdiv(stop - start // GROUP * GROUP, _TILE), 0)
    start = gl.minimum(start // GROUP * GROUP, (gl.cdiv(sequence[0], _TILE) - count) * _TILE)
    return start, start + count * _TILE


@gluon.jit
def _ranges(
    first_slot, sequence, LEAD: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr, HAS_KEY_MASK: gl.constexpr
):  # fmt: skip
    """Those of a call. Without MASK `late` is `stop`."""
    if MASK is None:
        begin, full, stop = _query_ranges(first_slot, sequence[0], sequence[1], LEAD, CAUSAL, HAS_KEY_MASK)
        late = stop
    else:
        begin, full, late, stop = _masked_query_ranges(first_slot, sequence, LEAD, MASK, HAS_KEY_MASK)
    return begin, full, late, stop


@gluon.constexpr_function
def _sees_whole_diagonal(mask, has_key_mask):
    """Whether queries that do not see all of a block yet, and those in their tiles, still see its first slot."""
    window, block_size, _, bounded = mask
    return not (has_key_mask or bounded) and (window == 0 or window >= _ROWS.value + _TILE.value + block_size)


@gluon.jit
def _query_bounds(slot, sequence, LEAD: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr):
    """The first query that sees a slot, where its group is not kept, and the last one."""
    seqlen_q, slots, leftpad, lower_ptr, upper_ptr = sequence
    q_pos_offset = slots - seqlen_q
    behind = slot + GROUP - slot % GROUP if LEAD > 0 else slot  # the first slot whose queries see it
    if MASK is None:
        first = behind - q_pos_offset if CAUSAL else slot * 0
        last = slot * 0 + _NEVER
    else:
        first = first_query_to_see(
            behind, seqlen_q, q_pos_offset, slots, leftpad, upper_ptr, LEAD, MASK[1], MASK[2], MASK[3] > 0
        )  # fmt: skip
        last = slot * 0 + seqlen_q - 1
        if has_lower_bounds(MASK):
            last = queries_that_reach(
                slot, seqlen_q, q_pos_offset, leftpad, lower_ptr, LEAD, MASK[0], MASK[1], MASK[2], MASK[3] > 0
            ) - 1  # fmt: skip
    return first, last


@gluon.jit
def _kept_query_bounds(slot, first, last, sequence, LEAD: gl.constexpr, MASK: gl.constexpr):
    """The first and the last query of a slot's own group, which is kept, by its `_query_bounds`; in the sink group `last`."""
    seqlen_q, slots, leftpad, _, upper_ptr = sequence
    if MASK is None:
        own = slot - (slots - seqlen_q)
    else:
        own = first_query_to_see(
            gl.maximum(slot, LEAD), seqlen_q, slots - seqlen_q, slots, leftpad, upper_ptr, LEAD, MASK[1], MASK[2], MASK[3] > 0
        )  # fmt: skip
    return gl.where(first == _NEVER, _NEVER, own), gl.where(slot < LEAD + GROUP, last, gl.minimum(first - 1, last))


@gluon.jit
def _tiles(start, stop, heads, EACH: gl.constexpr = _PAIR):
    """How many tiles of `heads` heads these queries are. Made even with `EACH` 2: a last one of nothing goes with an odd one."""
    return gl.cdiv((stop - start) // _TILE * heads, EACH) * EACH


@gluon.jit
def _held_operand(tile, BLOCK_D: gl.constexpr):
    """K or V [64, BLOCK_D] of a warp group, of all products with tiles of queries: in registers, where these can hold it.

    With 64 columns, products of which both operands are in shared memory wait for it.
    """
    if BLOCK_D == 64:
        tile = tile.load(gl.DotOperandLayout(0, accumulator(_TILE), 2))
    return tile


@gluon.jit
def _sum_tiles(
    grad_key, grad_value, step, tiles, start, stop, k, v, first, last, buffers, softmax_scale_log2,
    BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr, QUANTIZE: gl.constexpr, EACH: gl.constexpr = _PAIR,
):  # fmt: skip
    """dS^T QF and PF~^T (dO / l), or with kept groups P^T dO, over the next tiles of queries, EACH a step of the loop.

    Tiles begin with the query `start`; at `stop` they begin again, for the next head. A slot is seen by the queries from `first`
    to `last`, int32 [64]; None: all of these tiles are behind its first one, or in front of its last one.
    Without CAUSAL it is seen by all or, with `first` _NEVER, by none.
    """
    q_tiles, grad_out_tiles, row_max_tiles, delta_tiles, q_full, grad_out_full, empty = buffers
    STAGES: gl.constexpr = q_tiles.shape[0]
    SCORES: gl.constexpr = accumulator(_TILE)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, SCORES)
    zeros = gl.zeros((WARP_GROUP_ROWS, _TILE), gl.float32, SCORES)
    query = start
    for _ in range(tiles // EACH):
        for i in gl.static_range(EACH):
            stage, phase = step % STAGES, step // STAGES & 1
            q, grad_out = q_tiles.index(stage), grad_out_tiles.index(stage)  # [TILE, BLOCK_D]
            mbarrier.wait(q_full.index(stage), phase)
            scores = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            if i > 0:  # the products of the tile before
                grad_key, grad_value = warpgroup_mma_wait(1, [grad_key, grad_value])
                mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
            mbarrier.wait(grad_out_full.index(stage), phase)
            grad_p = warpgroup_mma(v, grad_out.permute((1, 0)), zeros, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(1, [scores])
            row_max = row_max_tiles.index(stage).load(COLUMNS)  # [TILE]
            p = gl.exp2(scores * softmax_scale_log2 - row_max[None, :])
            column = gl.arange(0, _TILE, COLUMNS)[None, :]
            if first is not None:
                p = gl.where(column >= (first - query)[:, None], p, 0.0)
            if last is not None:
                p = gl.where(column <= (last - query)[:, None], p, 0.0)
            rounded = quantize_p_along_rows(p) if QUANTIZE else p.to(gl.bfloat16)
            grad_p = warpgroup_mma_wait(0, [grad_p])
            delta = delta_tiles.index(stage).load(COLUMNS)  # [TILE]
            grad_scores = (p * (grad_p - delta[None, :])).to(gl.bfloat16)
            grad_key = warpgroup_mma(left_operand(grad_scores, BLOCK_D), q, grad_key, is_async=True)
            grad_value = warpgroup_mma(left_operand(rounded, BLOCK_D), grad_out, grad_value, is_async=True)
            if i == EACH - 1:
                grad_key, grad_value = warpgroup_mma_wait(0, [grad_key, grad_value])
                mbarrier.arrive(empty.index(stage), count=1)
            step += 1
            if CAUSAL and (first is not None or last is not None):
                query = gl.where(query + _TILE < stop, query + _TILE, start)
    return grad_key, grad_value, step


@gluon.jit
def _skip_tiles(step, tiles, buffers):
    """Gives back the next tiles, which only other warp groups need."""
    q_tiles, _, _, _, q_full, grad_out_full, empty = buffers
    STAGES: gl.constexpr = q_tiles.shape[0]
    for _ in range(tiles):
        stage, phase = step % STAGES, step // STAGES & 1
        mbarrier.wait(q_full.index(stage), phase)
        mbarrier.wait(grad_out_full.index(stage), phase)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return step


@gluon.jit
def _sum_kept(
    grad_key, grad_value, step, tiles, start, stop, k, v, mine, own, own_last, buffers, softmax_scale_log2,
    BLOCK_D: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """`_sum_tiles` over kept groups. mine: `_kept_range` of this warp group; tiles without such queries are given back."""
    first, last = mine
    query = start
    for _ in range(tiles):
        if (query < last) & (query + _TILE > first):
            grad_key, grad_value, step = _sum_tiles(
                grad_key, grad_value, step, 1, query, query + _TILE, k, v, own, own_last, buffers,
                softmax_scale_log2, BLOCK_D, CAUSAL, False, 1,
            )  # fmt: skip
        else:
            step = _skip_tiles(step, 1, buffers)
        query = gl.where(query + _TILE < stop, query + _TILE, start)
    return grad_key, grad_value


@gluon.jit
def _compute(
    PART: gl.constexpr, work, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, LEAD: gl.constexpr, CAUSAL: gl.constexpr,
    MASK: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 of the block's slots. Pointers are those of the first slot's mask, and of the first key's results."""
    kv_tiles, kv_full, buffers, pointers, out_stride_l, first_slot, sequence, heads, scales = work
    softmax_scale_log2, softmax_scale = scales
    grad_key_ptr, grad_value_ptr, key_mask_ptr = pointers
    k_tiles, v_tiles, v_kept_tiles = kv_tiles
    HAS_KEY_MASK: gl.constexpr = key_mask_ptr is not None
    slots = sequence[1]
    block_first_slot = first_slot
    begin, full, late, stop = _ranges(first_slot, sequence, LEAD, CAUSAL, MASK, HAS_KEY_MASK)
    first_slot += PART * WARP_GROUP_ROWS
    slot = first_slot + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, accumulator(_TILE)))
    present = (slot >= LEAD) & (slot < slots)
    if HAS_KEY_MASK:
        present = present & (gl.load(key_mask_ptr + slot, mask=present, other=0) != 0)
    first, last = _query_bounds(slot, sequence, LEAD, CAUSAL, MASK)
    first = gl.where(present, first, _NEVER)
    grad_key = gl.zeros((WARP_GROUP_ROWS, BLOCK_D), gl.float32, accumulator(BLOCK_D))
    grad_value = gl.zeros((WARP_GROUP_ROWS, BLOCK_D), gl.float32, accumulator(BLOCK_D))
    bounded, whole = _tiles(begin, full, heads), _tiles(full, late, heads)
    after = _tiles(late, stop, heads)
    step = gl.to_tensor(0)
    if (first_slot >= slots) | (first_slot + WARP_GROUP_ROWS <= LEAD):
        step = _skip_tiles(step, bounded + whole + after, buffers)
        bounded, whole, after = 0, 0, 0
    mbarrier.wait(kv_full.index(PART), 0)
    k, v = _held_operand(k_tiles.index(PART), BLOCK_D), _held_operand(v_tiles.index(PART), BLOCK_D)
    if MASK is None:
        grad_key, grad_value, step = _sum_tiles(
            grad_key, grad_value, step, bounded, begin, full, k, v, first, None, buffers,
            softmax_scale_log2, BLOCK_D, CAUSAL, True,
        )  # fmt: skip
    else:
        last_of_bounded = None if _sees_whole_diagonal(MASK, HAS_KEY_MASK) else last
        grad_key, grad_value, step = _sum_tiles(
            grad_key, grad_value, step, bounded, begin, full, k, v, first, last_of_bounded, buffers,
            softmax_scale_log2, BLOCK_D, CAUSAL, True,
        )  # fmt: skip
    grad_key, grad_value, step = _sum_tiles(
        grad_key, grad_value, step, whole, full, late, k, v, None, None, buffers,
        softmax_scale_log2, BLOCK_D, CAUSAL, True,
    )  # fmt: skip
    if MASK is not None:
        grad_key, grad_value, step = _sum_tiles(
            grad_key, grad_value, step, after, late, stop, k, v, None, last, buffers,
            softmax_scale_log2, BLOCK_D, CAUSAL, True,
        )  # fmt: skip
    grad_value *= _INV_P_GLOBAL_SCALE
    if LEAD > 0:
        kept_start, kept_stop = _kept_tiles(block_first_slot, sequence, LEAD, MASK)
        own, own_last = _kept_query_bounds(slot, first, last, sequence, LEAD, MASK)
        kept, mine = _tiles(kept_start, kept_stop, heads, 1), _kept_range(first_slot, sequence, WARP_GROUP_ROWS, LEAD, MASK)
        v = _held_operand(v_kept_tiles.index(PART), BLOCK_D)
        grad_key, grad_value = _sum_kept(
            grad_key, grad_value, step, kept, kept_start, kept_stop, k, v, mine, own, own_last, buffers,
            softmax_scale_log2, BLOCK_D, CAUSAL,
        )  # fmt: skip

    if ROTATE:
        grad_key = rotate_back(grad_key)
    slot = first_slot + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, accumulator(BLOCK_D)))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, accumulator(BLOCK_D)))
    present = (slot >= LEAD) & (slot < slots)
    if HAS_KEY_MASK:
        present = present & (gl.load(key_mask_ptr + slot, mask=present, other=0) != 0)
    where = present[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = (slot - LEAD).to(gl.int64)[:, None] * out_stride_l + columns[None, :]
    gl.store(grad_key_ptr + offsets, (grad_key * softmax_scale).to(grad_key_ptr.dtype.element_ty), mask=where)
    gl.store(grad_value_ptr + offsets, grad_value.to(grad_value_ptr.dtype.element_ty), mask=where)


@gluon.jit
def _copy_tiles(sources, rows, step, start, stop, heads, buffers, BLOCK_D: gl.constexpr, EACH: gl.constexpr = _PAIR):
    """Tiles of the queries from `start` to `stop` of all heads, and at the end one of zeros where `_tiles` counts it.

    rows: the first one of Q, rows of a head, how much further down the statistics are, and one behind all tensors.
    """
    q_desc, grad_out_desc, stats_desc, delta_desc = sources
    q_row, q_rows, stats_row, delta_row, nothing = rows
    q_tiles, grad_out_tiles, row_max_tiles, delta_tiles, q_full, grad_out_full, empty = buffers
    STAGES: gl.constexpr = q_tiles.shape[0]
    number = (stop - start) // _TILE * heads
    query = start
    for i in range(_tiles(start, stop, heads, EACH)):
        stage, phase = step % STAGES, step // STAGES & 1 ^ 1
        row = gl.where(i < number, q_row + query, nothing)
        mbarrier.wait(empty.index(stage), phase)
        mbarrier.expect(q_full.index(stage), _TILE * (BLOCK_D * 2 + 4))
        tma.async_copy_global_to_shared(q_desc, [row, 0], q_full.index(stage), q_tiles.index(stage))
        tma.async_copy_global_to_shared(stats_desc, [stats_row + row], q_full.index(stage), row_max_tiles.index(stage))
        mbarrier.expect(grad_out_full.index(stage), _TILE * (BLOCK_D * 2 + 4))
        tma.async_copy_global_to_shared(grad_out_desc, [row, 0], grad_out_full.index(stage), grad_out_tiles.index(stage))
        tma.async_copy_global_to_shared(delta_desc, [delta_row + row], grad_out_full.index(stage), delta_tiles.index(stage))
        step += 1
        last = query + _TILE >= stop
        query = gl.where(last, start, query + _TILE)
        q_row += gl.where(last, q_rows, 0)
    return step


@gluon.jit
def _copy(
    work, BLOCK_D: gl.constexpr, LEAD: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr, HAS_KEY_MASK: gl.constexpr
):  # fmt: skip
    """The warp that copies: K and V of every warp group, then tiles of queries in the order of `_compute`."""
    descriptors, kv_tiles, kv_full, buffers, q_row, q_rows, all_q_rows, k_row, first_slot, sequence, heads = work
    q_desc, k_desc, v_desc, scaled_grad_out_desc, v_kept_desc, grad_out_desc, stats_desc, delta_desc = descriptors
    k_tiles, v_tiles, v_kept_tiles = kv_tiles
    begin, full, late, stop = _ranges(first_slot, sequence, LEAD, CAUSAL, MASK, HAS_KEY_MASK)
    for part in gl.static_range(_WARP_GROUPS):
        row = k_row + first_slot + part * WARP_GROUP_ROWS
        mbarrier.expect(kv_full.index(part), WARP_GROUP_ROWS * BLOCK_D * 2 * (3 if LEAD > 0 else 2))
        tma.async_copy_global_to_shared(k_desc, [row, 0], kv_full.index(part), k_tiles.index(part))
        tma.async_copy_global_to_shared(v_desc, [row, 0], kv_full.index(part), v_tiles.index(part))
        if LEAD > 0:
            tma.async_copy_global_to_shared(v_kept_desc, [row, 0], kv_full.index(part), v_kept_tiles.index(part))
    nothing = 2 * all_q_rows
    sources = (q_desc, scaled_grad_out_desc, stats_desc, delta_desc)
    rows = (q_row, q_rows, 0, all_q_rows, nothing)  # m, and the row sums of dO / l
    step = _copy_tiles(sources, rows, gl.to_tensor(0), begin, full, heads, buffers, BLOCK_D)
    step = _copy_tiles(sources, rows, step, full, late, heads, buffers, BLOCK_D)
    if MASK is not None:
        step = _copy_tiles(sources, rows, step, late, stop, heads, buffers, BLOCK_D)
    if LEAD > 0:
        kept_start, kept_stop = _kept_tiles(first_slot, sequence, LEAD, MASK)
        sources = (q_desc, grad_out_desc, stats_desc, delta_desc)
        rows = (q_row, q_rows, all_q_rows, 0, nothing)  # the log-sum-exp, and the row sums of dO
        _copy_tiles(sources, rows, step, kept_start, kept_stop, heads, buffers, BLOCK_D, 1)


# Without this every length would be compiled.
@gluon.jit(do_not_specialize=["num_heads", "num_heads_k", "seqlen_q", "seqlen_k", "num_blocks", "splits"])
def grad_key_value_kernel(
    q_desc, k_desc, v_desc, scaled_grad_out_desc, v_kept_desc, grad_out_desc, stats_desc, delta_desc,
    pointers, sequences, out_strides, operand_rows,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, splits, softmax_scale_log2, softmax_scale,
    HEAD_DIM: gl.constexpr, SEEN: gl.constexpr, ROTATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 slots of one key head, summed over the query heads that share them. Excluded keys are not written.

    Operands and results are those of triton/grad_key_value.py; stats and delta: tiles [64] of float32 [2 all_q_rows].
    SEEN as in ranges.py.

    Args:
        pointers: grad_key_ptr and grad_value_ptr.
        sequences: key_mask_ptr, leftpad_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, lower_ptr and upper_ptr; each may be None.
        out_strides: of batch, heads, tokens and splits.
        operand_rows: of Q and of K of a head, and all of Q.
        num_blocks: of a key head. splits: into how many parts each block's queries are cut, one with CAUSAL; their results are to
            be summed.
    """
    BLOCK_D: gl.constexpr = q_desc.block_shape[1]
    LEAD: gl.constexpr = _PAD - GROUP if v_kept_desc is not None else 0
    grad_key_ptr, grad_value_ptr = pointers
    key_mask_ptr, leftpad_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, lower_ptr, upper_ptr = sequences
    CAUSAL: gl.constexpr = SEEN is not None
    MASK: gl.constexpr = mask_of(SEEN)
    q_rows, k_rows, all_q_rows = operand_rows
    VARLEN: gl.constexpr = cu_seqlens_q_ptr is not None
    heads = num_heads // num_heads_k
    batch_head, block = place(num_blocks * splits, CAUSAL)
    split, block = block % splits, block // splits
    batch, head_k = batch_head // num_heads_k, batch_head % num_heads_k
    q_start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    slots, token = seqlen_k + LEAD, gl.to_tensor(k_start)
    q_row = first_row(batch, head_k * heads, num_heads, q_rows, q_start, 0, VARLEN)
    if not CAUSAL:  # the queries of this split
        tiles = gl.cdiv(seqlen_q, _TILE)
        first_query = tiles * split // splits * _TILE
        seqlen_q = gl.minimum(seqlen_q, tiles * (split + 1) // splits * _TILE) - first_query
        q_row += first_query
    k_row = first_row(batch, head_k, num_heads_k, k_rows, k_start, LEAD, VARLEN)
    leftpad = 0
    if key_mask_ptr is not None:
        leftpad = gl.load(leftpad_ptr + batch)
        slots -= leftpad
        token += leftpad
        key_mask_ptr += batch.to(gl.int64) * k_rows
    offset = batch.to(gl.int64) * out_strides[0] + head_k.to(gl.int64) * out_strides[1] + token.to(gl.int64) * out_strides[2]
    offset += split.to(gl.int64) * out_strides[3]
    if lower_ptr is not None:
        lower_ptr, upper_ptr = bounds_of(batch, lower_ptr, upper_ptr, seqlen_q, SEEN)
    here = (seqlen_q, slots, leftpad, lower_ptr, upper_ptr)
    pointers = (grad_key_ptr + offset, grad_value_ptr + offset, key_mask_ptr)

    k_tiles = gl.allocate_shared_memory(gl.bfloat16, [_WARP_GROUPS, WARP_GROUP_ROWS, BLOCK_D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [_WARP_GROUPS, WARP_GROUP_ROWS, BLOCK_D], v_desc.layout)
    v_kept_tiles = v_tiles
    if LEAD > 0:
        v_kept_tiles = gl.allocate_shared_memory(gl.bfloat16, [_WARP_GROUPS, WARP_GROUP_ROWS, BLOCK_D], v_desc.layout)
    buffers = (
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, _TILE, BLOCK_D], q_desc.layout),
        gl.allocate_shared_memory(gl.bfloat16, [STAGES, _TILE, BLOCK_D], scaled_grad_out_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, _TILE], stats_desc.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, _TILE], delta_desc.layout),
        new_barriers(STAGES, 1), new_barriers(STAGES, 1), new_barriers(STAGES, _WARP_GROUPS),
    )  # fmt: skip
    kv_tiles, kv_full = (k_tiles, v_tiles, v_kept_tiles), new_barriers(_WARP_GROUPS, 1)
    fence_async_shared()
    work = (
        kv_tiles, kv_full, buffers, pointers, out_strides[2], block * _ROWS, here, heads,
        (softmax_scale_log2, softmax_scale),
    )  # fmt: skip
    descriptors = (q_desc, k_desc, v_desc, scaled_grad_out_desc, v_kept_desc, grad_out_desc, stats_desc, delta_desc)
    copies = (descriptors, kv_tiles, kv_full, buffers, q_row, q_rows, all_q_rows, k_row, block * _ROWS, here, heads)
    gl.warp_specialize(
        [
            (_compute, (gl.constexpr(0), work, HEAD_DIM, BLOCK_D, LEAD, CAUSAL, MASK, ROTATE)),
            (_compute, (gl.constexpr(1), work, HEAD_DIM, BLOCK_D, LEAD, CAUSAL, MASK, ROTATE)),
            (_copy, (copies, BLOCK_D, LEAD, CAUSAL, MASK, gl.constexpr(key_mask_ptr is not None))),
        ],
        [4, 1],
        [240, 24],
    )
