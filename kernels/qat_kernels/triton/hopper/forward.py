"""The forward of docs/NUMERICS.md, sections 3 and 4, for Hopper (sm_90), in Gluon: the same numbers as triton/forward.py, faster.

One warp copies tiles of K and V; two or three warp groups of 64 queries each multiply and round. Tiles come in descending order:
the one that is cut off is then the first, and a warp group of a causal call skips the first ones, which it does not see. Kept
groups come last.
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

from qat_kernels.triton.forward import LN_2
from qat_kernels.triton.layout import PAD, first_row, sequence, slot_of
from qat_kernels.triton.nvfp4 import GROUP, P_GLOBAL_SCALE

from .pipeline import (
    WARP_GROUP_ROWS,
    accumulator,
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
from .ranges import (
    block_size_of,
    bounds_of,
    has_lower_bounds,
    is_wide,
    mask_of,
    prefix_of,
    row_bounds,
    rows_before,
    tile_ranges,
)
from .rescale import rescale
from .softmax import ORDER, halves, mask_scores, no_keys_yet, round_p, rows_of, softmax_step, to_operand

_PAD = gl.constexpr(PAD)


@gluon.jit
def _scores(q, k_ring, step):
    """The scores [64, N] of the tile of this step, which is given back."""
    N: gl.constexpr = k_ring[0].shape[1]
    zero = gl.zeros((WARP_GROUP_ROWS, N), gl.float32, accumulator(N))
    k = tile_at(k_ring, step).permute((1, 0))  # [D, N]
    wait_full(k_ring, step)
    scores = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    release(k_ring, step)
    return scores


@gluon.jit
def _slot_at(step, order, LEAD: gl.constexpr, N: gl.constexpr, MASK: gl.constexpr):
    """The first slot of the tile of this step: `main` tiles descend to `first`, then those of the prefix to the first of all."""
    first, main, steps = order
    slot = first + (main - 1 - step) * N
    if prefix_of(MASK) > 0:
        slot = gl.where(step < main, slot, (LEAD + GROUP if LEAD > 0 else 0) + (steps - 1 - step) * N)
    return slot


@gluon.jit
def _mask(scores, step, seen, LEAD: gl.constexpr, MASK: gl.constexpr):
    """Scores of the tile of this step, -inf where a row does not see a slot."""
    upper, lower, prefix_stop, order, full_start, full_stop = seen
    N: gl.constexpr = scores.shape[1]
    if MASK is None:
        scores = mask_scores(scores, _slot_at(step, order, LEAD, N, MASK), upper, None, None)
    elif not has_lower_bounds(MASK):
        if step < full_start:
            scores = mask_scores(scores, _slot_at(step, order, LEAD, N, MASK), upper, None, None)
    elif is_wide(MASK, N):
        if step < full_start:
            scores = mask_scores(scores, _slot_at(step, order, LEAD, N, MASK), upper, None, None)
        elif step >= full_stop:
            scores = mask_scores(scores, _slot_at(step, order, LEAD, N, MASK), None, lower, prefix_stop)
    elif (step < full_start) | (step >= full_stop):
        scores = mask_scores(scores, _slot_at(step, order, LEAD, N, MASK), upper, lower, prefix_stop)
    return scores


@gluon.jit
def _attend_ahead(
    out, p, row_max, row_sum, q, k_ring, v_ring, seen, start, stop, end, softmax_scale_log2,
    CHECK_BOUNDS: gl.constexpr, QUANTIZE_PV: gl.constexpr, LEAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Steps `start` to `stop`, not the first one, over quantized slots, without O'; the last of all is `end` - 1.

    p: the operand of the step before. seen: what the rows see, and where all see all of a tile, from `full_start` to `full_stop`.

    The tensor cores compute the scores of a tile, and then the product of the one before with V, while the scores are rounded.
    """
    N: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    zero = gl.zeros((WARP_GROUP_ROWS, N), gl.float32, accumulator(N))
    gl.assume(start >= 0)
    for step in range(start, stop):
        k = tile_at(k_ring, step).permute((1, 0))  # [D, N]
        v = tile_at(v_ring, step - 1)  # [N, D]
        scores = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        wait_full(v_ring, step - 1)
        out = warpgroup_mma(p, v, out, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        release(k_ring, step)
        if CHECK_BOUNDS:
            scores = _mask(scores, step, seen, LEAD, MASK)
        weights, group_max, factor, row_max, row_sum = softmax_step(scores, row_max, row_sum, softmax_scale_log2, CHECK_BOUNDS)
        p_next = to_operand(round_p(weights, group_max, QUANTIZE_PV), D)
        # Between rounding and wait, because ptxas would move the wait before them, were it not in another basic block.
        wait_full(k_ring, step + 1, step + 1 < end)
        out = warpgroup_mma_wait(0, [out])
        release(v_ring, step - 1)
        out = rescale(out, rows_of(factor, D))
        p = p_next
    return out, p, row_max, row_sum


@gluon.jit
def attend_quantized(
    out, row_max, row_sum, q, k_ring, v_ring, seen, start, end, softmax_scale_log2,
    CAUSAL: gl.constexpr, QUANTIZE_PV: gl.constexpr, LEAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Steps `start` to `end`, at least one, as `_attend_ahead`."""
    D: gl.constexpr = k_ring[0].shape[2]
    scores = _scores(q, k_ring, start)
    if CAUSAL or MASK is not None or start < seen[4]:
        scores = _mask(scores, start, seen, LEAD, MASK)
    weights, group_max, _, row_max, row_sum = softmax_step(scores, row_max, row_sum, softmax_scale_log2, CAUSAL)
    p = to_operand(round_p(weights, group_max, QUANTIZE_PV), D)
    wait_full(k_ring, start + 1, start + 1 < end)
    full_start = start + 1
    if MASK is not None:
        out, p, row_max, row_sum = _attend_ahead(
            out, p, row_max, row_sum, q, k_ring, v_ring, seen, start + 1, end, end, softmax_scale_log2,
            True, QUANTIZE_PV, LEAD, MASK,
        )  # fmt: skip
    else:
        full_start = seen[4]
        if CAUSAL:
            out, p, row_max, row_sum = _attend_ahead(
                out, p, row_max, row_sum, q, k_ring, v_ring, seen, start + 1, full_start, end, softmax_scale_log2,
                True, QUANTIZE_PV, LEAD, MASK,
            )  # fmt: skip
        out, p, row_max, row_sum = _attend_ahead(
            out, p, row_max, row_sum, q, k_ring, v_ring, seen, gl.maximum(start + 1, full_start), end, end, softmax_scale_log2,
            False, QUANTIZE_PV, LEAD, MASK,
        )  # fmt: skip
    wait_full(v_ring, end - 1)
    out = warpgroup_mma(p, tile_at(v_ring, end - 1), out, is_async=True)
    out = warpgroup_mma_wait(0, [out])
    release(v_ring, end - 1)
    return out, row_max, row_sum


@gluon.jit
def attend_in_halves(
    out, out_hp, row_max, row_sum, q, k_ring, v_ring, seen, step, softmax_scale_log2,
    CHECK_BOUNDS: gl.constexpr, QUANTIZE_PV: gl.constexpr, OUT_HP: gl.constexpr, LEAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """One step over quantized slots in a tile of 128, with O' or without; `seen` as in `_attend_ahead`.

    The tensor cores multiply the first half of a tile while the second one is rounded.
    """
    D: gl.constexpr = k_ring[0].shape[2]
    v = tile_at(v_ring, step)  # [N, D]
    scores = _scores(q, k_ring, step)
    if CHECK_BOUNDS:
        scores = _mask(scores, step, seen, LEAD, MASK)
    p, group_max, factor, row_max, row_sum = softmax_step(scores, row_max, row_sum, softmax_scale_log2, CHECK_BOUNDS)
    out = rescale(out, rows_of(factor, D))
    if OUT_HP:
        out_hp = rescale(out_hp, rows_of(factor, D))
    p_first, max_first, p_last, max_last = halves(p, group_max)
    wait_full(v_ring, step)
    if OUT_HP:
        out_hp = warpgroup_mma(to_operand(p_first.to(gl.bfloat16), D), v.slice(0, 64), out_hp, is_async=True)
    out = warpgroup_mma(to_operand(round_p(p_first, max_first, QUANTIZE_PV), D), v.slice(0, 64), out, is_async=True)
    if OUT_HP:
        out_hp = warpgroup_mma(to_operand(p_last.to(gl.bfloat16), D), v.slice(64, 64), out_hp, is_async=True)
    out = warpgroup_mma(to_operand(round_p(p_last, max_last, QUANTIZE_PV), D), v.slice(64, 64), out, is_async=True)
    if OUT_HP:
        out_hp, out = warpgroup_mma_wait(0, [out_hp, out])
    else:
        out = warpgroup_mma_wait(0, [out])
    release(v_ring, step)
    return out, out_hp, row_max, row_sum


@gluon.jit
def attend_halves(
    out, out_hp, row_max, row_sum, q, k_ring, v_ring, seen, start, stop, softmax_scale_log2,
    CHECK_BOUNDS: gl.constexpr, QUANTIZE_PV: gl.constexpr, OUT_HP: gl.constexpr, LEAD: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Steps `start` to `stop`, each as `attend_in_halves`."""
    gl.assume(start >= 0)
    for step in range(start, stop):
        out, out_hp, row_max, row_sum = attend_in_halves(
            out, out_hp, row_max, row_sum, q, k_ring, v_ring, seen, step, softmax_scale_log2,
            CHECK_BOUNDS, QUANTIZE_PV, OUT_HP, LEAD, MASK,
        )  # fmt: skip
    return out, out_hp, row_max, row_sum


@gluon.jit
def _attend_kept(
    out, out_hp, row_max, row_sum, q, k, v, last, lower, prefix_stop, first_slot, slots, softmax_scale_log2,
    LEAD: gl.constexpr, MASK: gl.constexpr, OUT_HP: gl.constexpr,
):  # fmt: skip
    """ORDER slots of kept groups from `first_slot` on, with unquantized P~ and V: those of the sink group, or open groups.

    The open group of a row holds its `last` slot. lower, prefix_stop: as in `mask_scores`.
    """
    D: gl.constexpr = k.shape[1]
    ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(ORDER))
    last = gl.convert_layout(last, ROWS, assert_trivial=True)
    scores = gl.zeros((WARP_GROUP_ROWS, ORDER), gl.float32, accumulator(ORDER))
    scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, [scores])
    slot = first_slot + slot_of(gl.arange(0, ORDER, gl.SliceLayout(0, accumulator(ORDER))), ORDER)
    kept_from = gl.where(first_slot < LEAD, LEAD, gl.maximum(last & -GROUP, LEAD + GROUP))
    allowed = (slot[None, :] >= kept_from[:, None]) & (slot[None, :] <= last[:, None]) & (slot < slots)[None, :]
    if has_lower_bounds(MASK):
        lower = gl.convert_layout(lower, ROWS, assert_trivial=True)
        allowed = allowed & ((slot[None, :] >= lower[:, None]) | (slot < prefix_stop)[None, :])
    scores = gl.where(allowed, scores, float("-inf"))
    weights, _, factor, new_max, new_sum = softmax_step(
        scores, gl.convert_layout(row_max, no_keys_yet(ORDER)[0].type.layout, assert_trivial=True),
        gl.convert_layout(row_sum, no_keys_yet(ORDER)[1].type.layout, assert_trivial=True), softmax_scale_log2, True,
    )  # fmt: skip
    p = to_operand(weights.to(gl.bfloat16), D)
    factor = rows_of(factor, D)
    out = warpgroup_mma(p, v, rescale(out, factor), is_async=True)
    if OUT_HP:
        out_hp = warpgroup_mma(p, v, rescale(out_hp, factor), is_async=True)
        out_hp, out = warpgroup_mma_wait(0, [out_hp, out])
    else:
        out = warpgroup_mma_wait(0, [out])
    row_max = gl.convert_layout(new_max, row_max.type.layout, assert_trivial=True)
    return out, out_hp, row_max, gl.convert_layout(new_sum, row_sum.type.layout, assert_trivial=True)


@gluon.jit
def _place(cu_seqlens, sizes, num_blocks, BLOCK_M: gl.constexpr, LEAD: gl.constexpr, SEEN: gl.constexpr):
    """Batch, head and first query of this program; first token and number of tokens of its queries and of its keys."""
    CAUSAL: gl.constexpr = SEEN is not None
    num_heads, seqlen_q, seqlen_k = sizes
    batch_head, block = place(num_blocks, CAUSAL)
    if CAUSAL:
        block = num_blocks - 1 - block
    batch = batch_head // num_heads
    q_start = 0
    k_start = 0
    if cu_seqlens is not None:
        q_start, seqlen_q = sequence(cu_seqlens[0], batch, seqlen_q, True)
        k_start, seqlen_k = sequence(cu_seqlens[1], batch, seqlen_k, True)
    first = block * BLOCK_M - rows_before(seqlen_q, seqlen_k + LEAD, SEEN)
    return batch, batch_head % num_heads, first, q_start, seqlen_q, k_start, seqlen_k


@gluon.jit
def store_statistics(
    quantized_max, row_max, row_sum, rows, seqlen_q, lse_ptr, lse_row, q_dot_k_shift_ptr, k_shift_scale,
    stats_ptr, stats_row, all_q_rows, D: gl.constexpr,
):  # fmt: skip
    """lse and, unless None, stats of these rows of a sequence, whose first one is at `lse_row` and `stats_row`.

    Returns what rows are to be multiplied by, float32 [64], beside an accumulator with D columns.
    """
    layout: gl.constexpr = gl.SliceLayout(1, accumulator(D))
    inside = (rows >= 0) & (rows < seqlen_q)
    row_sum = gl.sum(gl.sum(gl.sum(gl.sum(row_sum, 4), 3), 2), 1)
    row_sum = gl.convert_layout(row_sum, layout, assert_trivial=True)
    row_max = gl.convert_layout(row_max, layout, assert_trivial=True)
    empty = row_sum == 0.0
    lse_log2 = row_max + gl.log2(row_sum)
    if stats_ptr is not None:
        stats_ptr += stats_row
        quantized_max = gl.convert_layout(quantized_max, layout, assert_trivial=True)
        padded = (rows >= 0) & (rows < gl.cdiv(seqlen_q, _PAD) * _PAD)
        seen = inside & (quantized_max != float("-inf"))
        gl.store(stats_ptr + rows, gl.where(seen, quantized_max, float("inf")), mask=padded)
        gl.store(stats_ptr + all_q_rows + rows, gl.where(inside & (row_sum != 0.0), lse_log2, float("inf")), mask=padded)
    lse = gl.where(empty, float("-inf"), lse_log2 * LN_2)
    if q_dot_k_shift_ptr is not None:
        lse += k_shift_scale * gl.load(q_dot_k_shift_ptr + lse_row + rows, mask=inside, other=0.0)
    gl.store(lse_ptr + lse_row + rows, lse, mask=inside)
    return 1.0 / gl.where(empty, 1.0, row_sum)


@gluon.jit
def _store(
    out, out_hp, quantized_max, row_max, row_sum, place_in_block, arguments, BLOCK_M: gl.constexpr, LEAD: gl.constexpr,
    SEEN: gl.constexpr, QUANTIZED: gl.constexpr,
):  # fmt: skip
    """What a warp group writes, whose first row in its block is `place_in_block`; QUANTIZED: `out` is still 2688 times too large.

    It finds its place again: numbers kept from before would take registers from the loops.
    """
    D: gl.constexpr = out.shape[1]
    cu_seqlens, pointers, out_strides, lse_stride, sizes, operand_rows, num_blocks, k_shift_scale = arguments
    out_ptr, out_hp_ptr, lse_ptr, stats_ptr, q_dot_k_shift_ptr, _, _ = pointers
    out_stride_b, out_stride_h, out_stride_l, out_stride_d = out_strides
    q_rows, _, all_q_rows = operand_rows
    batch, head, first, q_start, seqlen_q, _, _ = _place(cu_seqlens, sizes, num_blocks, BLOCK_M, LEAD, SEEN)
    rows = first + place_in_block + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, accumulator(D)))
    inside = (rows >= 0) & (rows < seqlen_q)
    lse_row = head if cu_seqlens is not None else batch * sizes[0] + head
    inverse = store_statistics(
        quantized_max, row_max, row_sum, rows, seqlen_q,
        lse_ptr, lse_row.to(gl.int64) * lse_stride + q_start, q_dot_k_shift_ptr, k_shift_scale,
        stats_ptr, first_row(batch, head, sizes[0], q_rows, q_start, 0, cu_seqlens is not None).to(gl.int64), all_q_rows, D,
    )  # fmt: skip
    columns = gl.arange(0, D, gl.SliceLayout(0, accumulator(D)))
    offsets = batch.to(gl.int64) * out_stride_b + head.to(gl.int64) * out_stride_h
    offsets += (q_start + rows).to(gl.int64)[:, None] * out_stride_l + columns.to(gl.int64)[None, :] * out_stride_d
    if out_hp_ptr is not None:
        gl.store(out_hp_ptr + offsets, (out_hp * inverse[:, None]).to(out_hp_ptr.dtype.element_ty), mask=inside[:, None])
    if QUANTIZED:
        inverse = inverse * (1.0 / P_GLOBAL_SCALE)
    gl.store(out_ptr + offsets, (out * inverse[:, None]).to(out_ptr.dtype.element_ty), mask=inside[:, None])


@gluon.jit
def _consumer(
    common, WG: gl.constexpr, BLOCK_M: gl.constexpr, LEAD: gl.constexpr, SEEN: gl.constexpr, QUANTIZE_PV: gl.constexpr
):  # fmt: skip
    """A warp group: the WG-th 64 queries of those from `first` on."""
    q_tiles, q_full, k_ring, v_ring, arguments, sequence, first, order, kept, softmax_scale_log2 = common
    OUT_HP: gl.constexpr = arguments[1][1] is not None
    N: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    CAUSAL: gl.constexpr = SEEN is not None
    MASK: gl.constexpr = mask_of(SEEN)
    slots = sequence[1]
    block_first, main, steps = order
    first += WG * WARP_GROUP_ROWS
    rows = first + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, accumulator(N)))
    last, upper, lower, prefix_stop = row_bounds(rows, sequence, LEAD, CAUSAL, MASK)
    _, my_first, full_first, full_stop, stop, _, _, _ = tile_ranges(first, sequence, WARP_GROUP_ROWS, N, LEAD, CAUSAL, MASK)
    _, _, _, _, _, open_start, open_stop, _ = tile_ranges(first, sequence, WARP_GROUP_ROWS, ORDER, LEAD, CAUSAL, MASK)
    inside = first < sequence[0]  # else all of these are padding
    start = main - gl.maximum(stop - block_first, 0) // N
    end = steps
    if MASK is not None:
        if prefix_of(MASK) == 0:
            end = gl.maximum(main - (my_first - block_first) // N, start)
        end = gl.where(inside, end, start)
    out = gl.zeros((WARP_GROUP_ROWS, D), gl.float32, accumulator(D))
    out_hp = out
    row_max, row_sum = no_keys_yet(N)
    q = q_tiles.index(WG)
    mbarrier.wait(q_full.index(WG), 0)
    for step in range(start):
        skip(k_ring, v_ring, step)
    full_start = main - (full_stop - block_first) // N
    seen = (upper, lower, prefix_stop, order, full_start, main - (full_first - block_first) // N)
    if N == 128:
        if MASK is None:
            # Without a causal mask the first tile alone may be cut off.
            out, out_hp, row_max, row_sum = attend_halves(
                out, out_hp, row_max, row_sum, q, k_ring, v_ring, seen, start, full_start, softmax_scale_log2,
                True, QUANTIZE_PV, OUT_HP, LEAD, MASK,
            )  # fmt: skip
            start = gl.maximum(start, full_start)
        out, out_hp, row_max, row_sum = attend_halves(
            out, out_hp, row_max, row_sum, q, k_ring, v_ring, seen, start, end, softmax_scale_log2,
            MASK is not None, QUANTIZE_PV, OUT_HP, LEAD, MASK,
        )  # fmt: skip
    else:
        gl.static_assert(not OUT_HP)
        if start < end:
            out, row_max, row_sum = attend_quantized(
                out, row_max, row_sum, q, k_ring, v_ring, seen, start, end, softmax_scale_log2,
                CAUSAL, QUANTIZE_PV, LEAD, MASK,
            )  # fmt: skip
    if MASK is not None:
        for step in range(end, steps):
            skip(k_ring, v_ring, step)
    quantized_max = row_max
    if LEAD > 0:
        if QUANTIZE_PV:
            out = out * (1.0 / P_GLOBAL_SCALE)
        sink, block_open_start, all_steps = kept
        for step in range(steps, all_steps):
            wait_full(k_ring, step)
            wait_full(v_ring, step)
            for part in gl.static_range(N // ORDER):
                first_slot = _kept_slot_at(step - steps, sink, block_open_start, LEAD, N) + part * ORDER
                mine = (first_slot >= open_start) & (first_slot < open_stop)
                if block_size_of(MASK) >= WARP_GROUP_ROWS:  # at most two groups are open
                    mine = mine & ((first_slot == open_start) | (first_slot + ORDER >= open_stop))
                if inside & (mine | (first_slot == LEAD + GROUP - ORDER)):
                    out, out_hp, row_max, row_sum = _attend_kept(
                        out, out_hp, row_max, row_sum, q, tile_at(k_ring, step).slice(part * ORDER, ORDER),
                        tile_at(v_ring, step).slice(part * ORDER, ORDER), last, lower, prefix_stop, first_slot, slots,
                        softmax_scale_log2, LEAD, MASK, OUT_HP,
                    )  # fmt: skip
            release(k_ring, step)
            release(v_ring, step)
    _store(
        out, out_hp, quantized_max, row_max, row_sum, WG * WARP_GROUP_ROWS, arguments, BLOCK_M, LEAD, SEEN,
        QUANTIZE_PV and LEAD == 0,
    )  # fmt: skip


@gluon.jit
def _kept_slot_at(step, sink, open_start, LEAD: gl.constexpr, N: gl.constexpr):
    """The first slot of a tile of kept groups: that of the sink group, if `sink` is 1, then those of open groups."""
    return gl.where(step < sink, LEAD + GROUP - N, open_start + (step - sink) * N)


@gluon.jit
def _producer(loads, WARP_GROUPS: gl.constexpr, LEAD: gl.constexpr, MASK: gl.constexpr):
    """Copies the queries, and then K and V of each step."""
    q_desc, k_desc, v_desc, v_kept_desc, q_tiles, q_full, k_ring, v_ring, q_row, k_row, order, kept = loads
    N: gl.constexpr = k_ring[0].shape[1]
    _, _, steps = order
    for group in gl.static_range(WARP_GROUPS):
        load(q_desc, q_row + group * WARP_GROUP_ROWS, q_tiles.index(group), q_full.index(group))
    for step in range(steps):
        row = k_row + _slot_at(step, order, LEAD, N, MASK)
        load_step(k_desc, row, k_ring, step)
        load_step(v_desc, row, v_ring, step)
    if LEAD > 0:
        sink, open_start, all_steps = kept
        for step in range(steps, all_steps):
            row = k_row + _kept_slot_at(step - steps, sink, open_start, LEAD, N)
            load_step(k_desc, row, k_ring, step)
            load_step(v_kept_desc, row, v_ring, step)


# Without this every length would be compiled.
@gluon.jit(do_not_specialize=["lse_stride", "num_heads", "num_heads_k", "seqlen_q", "seqlen_k", "num_blocks"])
def attention_forward_kernel(
    q_desc, k_desc, v_desc, v_kept_desc, cu_seqlens, pointers, out_strides, operand_rows,
    lse_stride, num_heads, num_heads_k, seqlen_q, seqlen_k, num_blocks, softmax_scale_log2, k_shift_scale,
    SEEN: gl.constexpr, QUANTIZE_PV: gl.constexpr, WARP_GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """WARP_GROUPS times 64 queries of one head of one sequence.

    q, k, v, v_kept: operands (layout.py) in tiles of 64 queries and of N keys, permuted with ORDER 64; v_kept only where groups
    are kept. cu_seqlens: None, or those of Q and of K. pointers: out and out_hp (O'), which have the same strides, lse, stats,
    q_dot_k_shift, lower_ptr and upper_ptr; all but out and lse may be None. out_strides of batch, heads, tokens and head dim;
    lse_stride of heads. operand_rows: q_rows, k_rows, all_q_rows. All of them as in triton/forward.py; SEEN as in ranges.py.
    """
    N: gl.constexpr = k_desc.block_shape[0]
    D: gl.constexpr = k_desc.block_shape[1]
    BLOCK_M: gl.constexpr = WARP_GROUPS * WARP_GROUP_ROWS
    REGISTERS: gl.constexpr = 240 if WARP_GROUPS == 2 else 160  # of each thread that multiplies
    VARLEN: gl.constexpr = cu_seqlens is not None
    LEAD: gl.constexpr = _PAD - GROUP if v_kept_desc is not None else 0
    q_rows, k_rows, _ = operand_rows
    CAUSAL: gl.constexpr = SEEN is not None
    MASK: gl.constexpr = mask_of(SEEN)
    sizes = (num_heads, seqlen_q, seqlen_k)
    _, _, _, _, _, lower_ptr, upper_ptr = pointers
    batch, head, first, q_start, seqlen_q, k_start, seqlen_k = _place(cu_seqlens, sizes, num_blocks, BLOCK_M, LEAD, SEEN)
    head_k = head // (num_heads // num_heads_k)
    q_row = first_row(batch, head, num_heads, q_rows, q_start, 0, VARLEN)
    k_row = first_row(batch, head_k, num_heads_k, k_rows, k_start, LEAD, VARLEN)
    if lower_ptr is not None:
        lower_ptr, upper_ptr = bounds_of(batch, lower_ptr, upper_ptr, seqlen_q, SEEN)
    sequence_ = (seqlen_q, seqlen_k + LEAD, 0, lower_ptr, upper_ptr)
    head_stop, begin, _, _, stop, open_start, open_stop, sink = tile_ranges(first, sequence_, BLOCK_M, N, LEAD, CAUSAL, MASK)
    main = gl.maximum(stop - begin, 0) // N
    steps = main
    if MASK is not None:
        steps += (head_stop - (LEAD + GROUP if LEAD > 0 else 0)) // N
    order = (begin, main, steps)
    sink = gl.where(first < seqlen_q, sink, 0)
    kept = (sink, open_start, steps + sink + (open_stop - open_start) // N)

    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [WARP_GROUPS, WARP_GROUP_ROWS, D], q_desc.layout)
    q_full = new_barriers(WARP_GROUPS, 1)
    k_ring, v_ring = new_ring(k_desc, STAGES, WARP_GROUPS), new_ring(v_desc, STAGES, WARP_GROUPS)
    fence_async_shared()
    arguments = (cu_seqlens, pointers, out_strides, lse_stride, sizes, operand_rows, num_blocks, k_shift_scale)
    common = (q_tiles, q_full, k_ring, v_ring, arguments, sequence_, first, order, kept, softmax_scale_log2)
    loads = (q_desc, k_desc, v_desc, v_kept_desc, q_tiles, q_full, k_ring, v_ring, q_row + first, k_row, order, kept)
    if WARP_GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (common, gl.constexpr(0), BLOCK_M, LEAD, SEEN, QUANTIZE_PV)),
                (_consumer, (common, gl.constexpr(1), BLOCK_M, LEAD, SEEN, QUANTIZE_PV)),
                (_producer, (loads, WARP_GROUPS, LEAD, MASK)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (common, gl.constexpr(0), BLOCK_M, LEAD, SEEN, QUANTIZE_PV)),
                (_consumer, (common, gl.constexpr(1), BLOCK_M, LEAD, SEEN, QUANTIZE_PV)),
                (_consumer, (common, gl.constexpr(2), BLOCK_M, LEAD, SEEN, QUANTIZE_PV)),
                (_producer, (loads, WARP_GROUPS, LEAD, MASK)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
