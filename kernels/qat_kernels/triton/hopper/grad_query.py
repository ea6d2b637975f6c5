"""dQ on Hopper (docs/NUMERICS.md, section 5): the sums of triton/grad_query.py in the same order, and the same bits.

A block is three warp groups of 64 queries each of one head, and a warp that copies tiles of K and V ahead of them. The
exponentials run beside dP; dS is an operand from registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from qat_kernels.triton.layout import PAD, first_row, sequence
from qat_kernels.triton.nvfp4 import GROUP

from .pipeline import (
    WARP_GROUP_ROWS,
    accumulator,
    left_operand,
    load,
    load_step,
    new_barriers,
    new_ring,
    place,
    release,
    skip,
    tile_at,
    wait_full,
)
from .ranges import bounds_of, has_lower_bounds, is_wide, mask_of, prefix_of, row_bounds, rows_before, tile_ranges
from .rotation import rotate_back

_PAD = gl.constexpr(PAD)
_WARP_GROUPS = gl.constexpr(3)
_TILE = gl.constexpr(64)
"""Slots of a tile."""


@gluon.jit
def _sum_tiles(
    grad_query, step, start, stop, upper, kept_from, lower, prefix_stop, key_mask_ptr, operands, rings, softmax_scale_log2,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """dS KF over the slots from `start` to `stop`, whose tiles come next.

    Rows see those before `upper`, from `kept_from` on, and from `lower` on or before `prefix_stop`; int32 [64], but the last one
    is a number; None: all of these, or no prefix.
    """
    q, grad_out, lse_log2, delta = operands
    k_ring, v_ring = rings
    SCORES: gl.constexpr = accumulator(_TILE)
    zeros = gl.zeros((WARP_GROUP_ROWS, _TILE), gl.float32, SCORES)
    for first_slot in range(start, stop, _TILE):
        k, v = tile_at(k_ring, step), tile_at(v_ring, step)  # [_TILE, BLOCK_D]
        wait_full(k_ring, step)
        scores = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
        wait_full(v_ring, step)
        grad_p = warpgroup_mma(grad_out, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        p = gl.exp2(scores * softmax_scale_log2 - lse_log2[:, None])
        slot = first_slot + gl.arange(0, _TILE, gl.SliceLayout(0, SCORES))
        if upper is not None:
            p = gl.where(slot[None, :] < upper[:, None], p, 0.0)
        if kept_from is not None:
            p = gl.where(slot[None, :] >= kept_from[:, None], p, 0.0)
        if lower is not None:
            reached = slot[None, :] >= lower[:, None]
            if prefix_stop is not None:
                reached = reached | (slot < prefix_stop)[None, :]
            p = gl.where(reached, p, 0.0)
        if key_mask_ptr is not None:
            p = gl.where((gl.load(key_mask_ptr + slot) != 0)[None, :], p, 0.0)
        grad_p = warpgroup_mma_wait(0, [grad_p])
        release(v_ring, step)
        grad_scores = (p * (grad_p - delta[:, None])).to(gl.bfloat16)
        grad_query = warpgroup_mma(left_operand(grad_scores, BLOCK_D), k, grad_query, is_async=True)
        grad_query = warpgroup_mma_wait(0, [grad_query])
        release(k_ring, step)
        step += 1
    return grad_query, step


@gluon.jit
def _skip_tiles(step, start, stop, rings):
    """Gives back the tiles of the slots from `start` to `stop`, which only other warp groups need."""
    for _ in range(start, stop, _TILE):
        skip(rings[0], rings[1], step)
        step += 1
    return step


@gluon.jit
def _sum_quantized(
    grad_query, bounds, block, mine, inside, key_mask_ptr, operands, rings, softmax_scale_log2,
    ORIGIN: gl.constexpr, WINDOWED: gl.constexpr, WIDE: gl.constexpr, PREFIX: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """dS KF over the slots that are not kept. block, mine: `tile_ranges` of the block and of this warp group.

    WINDOWED: whether rows have lower bounds; WIDE: `is_wide`. Tiles that only other warp groups need are given back.
    """
    upper, lower, prefix_stop = bounds
    block_head_stop, block_first, block_stop = block[0], block[1], block[4]
    head_stop, first, begin, full, stop = mine[0], mine[1], mine[2], mine[3], mine[4]
    step = gl.to_tensor(0)
    if PREFIX:
        # Its tiles of the prefix go on where those of the block end, because those of the block begin there.
        head_stop = gl.where(inside, gl.minimum(head_stop, gl.maximum(block_head_stop, block_stop)), ORIGIN)
        grad_query, step = _sum_tiles(
            grad_query, step, ORIGIN, head_stop, upper, None, lower, prefix_stop, key_mask_ptr, operands, rings,
            softmax_scale_log2, BLOCK_D,
        )  # fmt: skip
        step = _skip_tiles(step, head_stop, block_head_stop, rings)
        block_first = gl.maximum(block_first, head_stop)
    if WINDOWED or PREFIX:
        first = gl.minimum(first, gl.maximum(block_stop, block_first))
        step = _skip_tiles(step, block_first, first, rings)
        stop = gl.where(inside, gl.maximum(stop, first), first)
    if key_mask_ptr is not None:
        full = first
    else:
        begin = gl.minimum(begin, stop)
        full = gl.maximum(gl.minimum(full, stop), begin)
        if WINDOWED:
            grad_query, step = _sum_tiles(
                grad_query, step, first, begin, None if WIDE else upper, None, lower, prefix_stop, None, operands, rings,
                softmax_scale_log2, BLOCK_D,
            )  # fmt: skip
        grad_query, step = _sum_tiles(
            grad_query, step, begin, full, None, None, None, None, None, operands, rings, softmax_scale_log2, BLOCK_D
        )  # fmt: skip
    if WINDOWED and key_mask_ptr is not None:
        grad_query, step = _sum_tiles(
            grad_query, step, full, stop, upper, None, lower, prefix_stop, key_mask_ptr, operands, rings,
            softmax_scale_log2, BLOCK_D,
        )  # fmt: skip
    else:  # all see the first slot of these tiles
        grad_query, step = _sum_tiles(
            grad_query, step, full, stop, upper, None, None, None, key_mask_ptr, operands, rings, softmax_scale_log2, BLOCK_D
        )  # fmt: skip
    return grad_query, _skip_tiles(step, stop, block_stop, rings)


@gluon.jit
def _sum_kept(
    grad_query, step, last, bounds, block, mine, inside, key_mask_ptr, operands, rings, softmax_scale_log2,
    ORIGIN: gl.constexpr, LEAD: gl.constexpr, WINDOWED: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """The same over the kept groups: that of the sink, then those that are open. `last`: the end of what rows see."""
    upper, lower, prefix_stop = bounds
    block_open_start, block_open_stop, block_sink = block[5], block[6], block[7]
    open_start, open_stop, sink = mine[5], mine[6], ORIGIN - _TILE * gl.where(inside, mine[7], 0)
    step = _skip_tiles(step, ORIGIN - _TILE * block_sink, sink, rings)
    if WINDOWED:
        grad_query, step = _sum_tiles(
            grad_query, step, sink, ORIGIN, last, upper * 0 + LEAD, lower, prefix_stop, key_mask_ptr, operands, rings,
            softmax_scale_log2, BLOCK_D,
        )  # fmt: skip
    else:
        grad_query, step = _sum_tiles(
            grad_query, step, sink, ORIGIN, last, upper * 0 + LEAD, None, None, key_mask_ptr, operands, rings,
            softmax_scale_log2, BLOCK_D,
        )  # fmt: skip
    step = _skip_tiles(step, block_open_start, gl.minimum(open_start, block_open_stop), rings)
    kept_from = gl.maximum(upper, ORIGIN)
    if WINDOWED:
        grad_query, step = _sum_tiles(
            grad_query, step, open_start, open_stop, last, kept_from, lower, prefix_stop, key_mask_ptr, operands, rings,
            softmax_scale_log2, BLOCK_D,
        )  # fmt: skip
    else:
        grad_query, step = _sum_tiles(
            grad_query, step, open_start, open_stop, last, kept_from, None, None, key_mask_ptr, operands, rings,
            softmax_scale_log2, BLOCK_D,
        )  # fmt: skip
    _skip_tiles(step, open_stop, block_open_stop, rings)
    return grad_query


@gluon.jit
def _compute(
    PART: gl.constexpr, work, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, LEAD: gl.constexpr, CAUSAL: gl.constexpr,
    MASK: gl.constexpr, ROTATE: gl.constexpr,
):  # fmt: skip
    """dQ of 64 of the block's queries, which begin at `start`. Pointers are those of the sequence's first query or slot."""
    q_tiles, grad_out_tiles, q_full, rings, pointers, strides, start, sequence, softmax_scale_log2, softmax_scale = work
    grad_out_ptr, delta_ptr, stats_ptr, grad_query_ptr, key_mask_ptr = pointers
    grad_out_stride_l, grad_out_stride_d, out_stride_l = strides
    seqlen_q, slots, _, _, _ = sequence
    ORIGIN: gl.constexpr = LEAD + GROUP if LEAD > 0 else 0  # behind the sink group
    ROWS: gl.constexpr = q_tiles.shape[0] * WARP_GROUP_ROWS
    block = tile_ranges(start, sequence, ROWS, _TILE, LEAD, CAUSAL, MASK)
    start += PART * WARP_GROUP_ROWS
    mine = tile_ranges(start, sequence, WARP_GROUP_ROWS, _TILE, LEAD, CAUSAL, MASK)

    grad_out = grad_out_tiles.index(PART)  # [64, BLOCK_D]
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    rows = start + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, LOAD))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, LOAD))
    where = ((rows >= 0) & (rows < seqlen_q))[:, None] & (columns < HEAD_DIM)[None, :]
    offsets = rows.to(gl.int64)[:, None] * grad_out_stride_l + columns.to(gl.int64)[None, :] * grad_out_stride_d
    grad_out.store(gl.load(grad_out_ptr + offsets, mask=where, other=0.0).to(gl.bfloat16))
    fence_async_shared()
    gl.thread_barrier()  # here, or the compiler puts one into every step of the loops
    rows = start + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, accumulator(_TILE)))
    inside = (rows >= 0) & (rows < seqlen_q)
    lse_log2 = gl.load(stats_ptr + rows, mask=inside, other=float("inf"))
    delta = gl.load(delta_ptr + rows, mask=inside, other=0.0)
    last, upper, lower, prefix_stop = row_bounds(rows, sequence, LEAD, CAUSAL, MASK)
    bounds = (upper, lower, prefix_stop if prefix_of(MASK) > 0 else None)

    operands = (q_tiles.index(PART), grad_out, lse_log2, delta)
    grad_query = gl.zeros((WARP_GROUP_ROWS, BLOCK_D), gl.float32, accumulator(BLOCK_D))
    mbarrier.wait(q_full.index(PART), 0)
    grad_query, step = _sum_quantized(
        grad_query, bounds, block, mine, start < seqlen_q, key_mask_ptr, operands, rings, softmax_scale_log2,
        ORIGIN, has_lower_bounds(MASK), is_wide(MASK, _TILE), prefix_of(MASK) > 0, BLOCK_D,
    )  # fmt: skip
    if LEAD > 0:
        grad_query = _sum_kept(
            grad_query, step, gl.minimum(last + 1, slots), bounds, block, mine, start < seqlen_q, key_mask_ptr, operands, rings,
            softmax_scale_log2, ORIGIN, LEAD, has_lower_bounds(MASK), BLOCK_D,
        )  # fmt: skip

    if ROTATE:
        grad_query = rotate_back(grad_query)
    rows = start + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, accumulator(BLOCK_D)))
    columns = gl.arange(0, BLOCK_D, gl.SliceLayout(0, accumulator(BLOCK_D)))
    where = ((rows >= 0) & (rows < seqlen_q))[:, None] & (columns < HEAD_DIM)[None, :]
    grad_query = (grad_query * softmax_scale).to(grad_query_ptr.dtype.element_ty)
    gl.store(grad_query_ptr + rows.to(gl.int64)[:, None] * out_stride_l + columns[None, :], grad_query, mask=where)


@gluon.jit
def _copy_tiles(k_desc, v_desc, k_row, step, start, stop, rings):
    """Tiles of K and V for the slots from `start` to `stop`."""
    for first_slot in range(start, stop, _TILE):
        load_step(k_desc, k_row + first_slot, rings[0], step)
        load_step(v_desc, k_row + first_slot, rings[1], step)
        step += 1
    return step


@gluon.jit
def _copy(work, LEAD: gl.constexpr, CAUSAL: gl.constexpr, MASK: gl.constexpr):
    """The warp that copies: Q of every warp group, then all tiles that one of them needs, in the order of `_compute`."""
    descriptors, q_tiles, q_full, rings, q_row, k_row, start, sequence = work
    q_desc, k_desc, v_desc, v_kept_desc = descriptors
    WARP_GROUPS: gl.constexpr = q_tiles.shape[0]
    ORIGIN: gl.constexpr = LEAD + GROUP if LEAD > 0 else 0
    head_stop, first, _, _, stop, open_start, open_stop, sink = tile_ranges(
        start, sequence, WARP_GROUPS * WARP_GROUP_ROWS, _TILE, LEAD, CAUSAL, MASK
    )  # fmt: skip
    for part in gl.static_range(WARP_GROUPS):
        load(q_desc, q_row + start + part * WARP_GROUP_ROWS, q_tiles.index(part), q_full.index(part))
    step = gl.to_tensor(0)
    if prefix_of(MASK) > 0:
        step = _copy_tiles(k_desc, v_desc, k_row, step, ORIGIN, head_stop, rings)
    step = _copy_tiles(k_desc, v_desc, k_row, step, first, stop, rings)
    if LEAD > 0:
        step = _copy_tiles(k_desc, v_kept_desc, k_row, step, ORIGIN - _TILE * sink, ORIGIN, rings)
        step = _copy_tiles(k_desc, v_kept_desc, k_row, step, open_start, open_stop, rings)


# Without this every length would be compiled.
@gluon.jit(do_not_specialize=["num_heads", "num_heads_k", "seqlen_q", "seqlen_k", "num_blocks"])
def grad_query_kernel(
    q_desc, k_desc, v_desc, v_kept_desc, pointers, sequences, grad_out_strides, out_strides, operand_rows,
    num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, softmax_scale_log2, softmax_scale,
    HEAD_DIM: gl.constexpr, SEEN: gl.constexpr, ROTATE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dQ of 192 queries of one head.

    Operands, statistics and results are those of the kernel in triton/grad_query.py; SEEN as in ranges.py.

    Args:
        pointers: grad_out_ptr, delta_ptr, stats_ptr and grad_query_ptr.
        sequences: key_mask_ptr, leftpad_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, lower_ptr and upper_ptr; each may be None.
        grad_out_strides: of batch, heads, tokens and head dim; out_strides: of the first three.
        operand_rows: of Q and of K of a head, and all of Q.
    """
    BLOCK_D: gl.constexpr = q_desc.block_shape[1]
    LEAD: gl.constexpr = _PAD - GROUP if v_kept_desc is not None else 0
    grad_out_ptr, delta_ptr, stats_ptr, grad_query_ptr = pointers
    key_mask_ptr, leftpad_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, lower_ptr, upper_ptr = sequences
    CAUSAL: gl.constexpr = SEEN is not None
    MASK: gl.constexpr = mask_of(SEEN)
    q_rows, k_rows, all_q_rows = operand_rows
    VARLEN: gl.constexpr = cu_seqlens_q_ptr is not None
    batch_head, block = place(num_blocks, CAUSAL)
    if CAUSAL:
        block = num_blocks - 1 - block
    batch, head = batch_head // num_heads, batch_head % num_heads
    q_start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    k_start, seqlen_k = sequence(cu_seqlens_k_ptr, batch, seqlen_k, VARLEN)
    slots = seqlen_k + LEAD
    q_row = first_row(batch, head, num_heads, q_rows, q_start, 0, VARLEN)
    k_row = first_row(batch, head // (num_heads // num_heads_k), num_heads_k, k_rows, k_start, LEAD, VARLEN)
    batch, head, token = batch.to(gl.int64), head.to(gl.int64), gl.to_tensor(q_start).to(gl.int64)
    leftpad = 0
    if key_mask_ptr is not None:
        leftpad = gl.load(leftpad_ptr + batch)
        key_mask_ptr += batch * k_rows
    if lower_ptr is not None:
        lower_ptr, upper_ptr = bounds_of(batch, lower_ptr, upper_ptr, seqlen_q, SEEN)
    here = (seqlen_q, slots - leftpad, leftpad, lower_ptr, upper_ptr)
    start = block * _WARP_GROUPS * WARP_GROUP_ROWS - rows_before(seqlen_q, slots - leftpad, SEEN)
    grad_out_ptr += batch * grad_out_strides[0] + head * grad_out_strides[1] + token * grad_out_strides[2]
    grad_query_ptr += batch * out_strides[0] + head * out_strides[1] + token * out_strides[2]
    pointers = (grad_out_ptr, delta_ptr + q_row, stats_ptr + all_q_rows + q_row, grad_query_ptr, key_mask_ptr)
    strides = (grad_out_strides[2], grad_out_strides[3], out_strides[2])

    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [_WARP_GROUPS, WARP_GROUP_ROWS, BLOCK_D], q_desc.layout)
    grad_out_tiles = gl.allocate_shared_memory(gl.bfloat16, [_WARP_GROUPS, WARP_GROUP_ROWS, BLOCK_D], q_desc.layout)
    q_full = new_barriers(_WARP_GROUPS, 1)
    rings = (new_ring(k_desc, STAGES, _WARP_GROUPS), new_ring(v_desc, STAGES, _WARP_GROUPS))
    fence_async_shared()
    work = (
        q_tiles, grad_out_tiles, q_full, rings, pointers, strides, start, here, softmax_scale_log2, softmax_scale,
    )  # fmt: skip
    copies = ((q_desc, k_desc, v_desc, v_kept_desc), q_tiles, q_full, rings, q_row, k_row, start, here)
    gl.warp_specialize(
        [
            (_compute, (gl.constexpr(0), work, HEAD_DIM, BLOCK_D, LEAD, CAUSAL, MASK, ROTATE)),
            (_compute, (gl.constexpr(1), work, HEAD_DIM, BLOCK_D, LEAD, CAUSAL, MASK, ROTATE)),
            (_compute, (gl.constexpr(2), work, HEAD_DIM, BLOCK_D, LEAD, CAUSAL, MASK, ROTATE)),
            (_copy, (copies, LEAD, CAUSAL, MASK)),
        ],
        [4, 4, 1],
        [160, 160, 24],
    )
