"""The online softmax on Hopper: scores of a warp group become P~ as operands, and the state of its rows."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qat_kernels.triton.layout import slot_of

from .pipeline import WARP_GROUP_ROWS, accumulator, left_operand
from .rounding import quantize_p

ORDER = gl.constexpr(64)
"""Of the keys' rows (layout.py): a thread then holds whole groups of P~."""


@gluon.jit
def softmax_step(scores, row_max, row_sum, softmax_scale_log2, CHECK_BOUNDS: gl.constexpr):
    """`online_softmax_step` of scores [64, N] with permuted columns: a thread holds whole groups, and its own part of row_sum.

    Returns P~ [64, N / 64, 8, 4, 2], the largest P~ of each group [64, N / 64, 1, 4, 1], what the rows are rescaled by, and
    their new state: row_max [64] and row_sum [64, 1, 1, 4, 1].
    """
    groups = gl.reshape(scores, (scores.shape[0], scores.shape[1] // ORDER, 8, 4, 2))
    group_max = gl.max(gl.max(groups, 4, keep_dims=True), 2, keep_dims=True)
    tile_max = gl.max(gl.max(gl.max(gl.max(group_max, 4), 3), 2), 1)
    row_max_new = gl.maximum(row_max, gl.ceil(tile_max * softmax_scale_log2))
    row_max_safe = row_max_new
    if CHECK_BOUNDS:  # rows that have seen no key yet: everything is exp2(-inf) = 0
        row_max_safe = gl.where(row_max_new == float("-inf"), 0.0, row_max_new)
    minus = row_max_safe[:, None, None, None, None]
    p = gl.exp2(groups * softmax_scale_log2 - minus)
    group_max = gl.exp2(group_max * softmax_scale_log2 - minus)
    factor = gl.exp2(row_max - row_max_safe)
    sums = gl.sum(gl.sum(gl.sum(p, 4, keep_dims=True), 2, keep_dims=True), 1, keep_dims=True)
    return p, group_max, factor, row_max_new, row_sum * factor[:, None, None, None, None] + sums


@gluon.jit
def to_operand(groups, D: gl.constexpr):
    """P~, cut into groups, as the first operand of a product with D columns. No value leaves its register."""
    return left_operand(gl.reshape(groups, (WARP_GROUP_ROWS, groups.numel // WARP_GROUP_ROWS)), D)


@gluon.jit
def round_p(p, group_max, QUANTIZE_PV: gl.constexpr):
    """The operand of O: PF~ * 2688, or the unquantized P~."""
    if QUANTIZE_PV:
        return quantize_p(p, group_max)
    else:
        return p.to(gl.bfloat16)


@gluon.jit
def rows_of(x, D: gl.constexpr):
    """One number a row, of any layout, as a column beside an accumulator with D columns."""
    return gl.convert_layout(x, gl.SliceLayout(1, accumulator(D)), assert_trivial=True)[:, None]


@gluon.jit
def mask_scores(scores, first_slot, upper, lower, prefix_stop):
    """Scores of the slots from `first_slot` on, -inf where they are not below the `upper` of the row.

    Nor from the `lower` of the row on or below `prefix_stop`. What is None is not looked at.
    """
    slot = first_slot + slot_of(gl.arange(0, scores.shape[1], gl.SliceLayout(0, accumulator(scores.shape[1]))), ORDER)
    if upper is not None:
        scores = gl.where(slot[None, :] < upper[:, None], scores, float("-inf"))
    if lower is not None:
        reached = slot[None, :] >= lower[:, None]
        if prefix_stop is not None:
            reached = reached | (slot < prefix_stop)[None, :]
        scores = gl.where(reached, scores, float("-inf"))
    return scores


@gluon.jit
def halves(p, group_max):
    """P~ and the largest of each group, of the first and of the last 64 keys of 128. No value leaves its register."""
    p_first, p_last = gl.split(gl.permute(p, (0, 2, 3, 4, 1)))
    max_first, max_last = gl.split(gl.permute(group_max, (0, 2, 3, 4, 1)))
    layout: gl.constexpr = gl.max(gl.max(p_first, 3, keep_dims=True), 1, keep_dims=True).type.layout
    max_first = gl.convert_layout(max_first, layout, assert_trivial=True)
    return p_first, max_first, p_last, gl.convert_layout(max_last, layout, assert_trivial=True)


@gluon.jit
def no_keys_yet(N: gl.constexpr):
    """row_max and row_sum of rows before their first key, in the layouts that `softmax_step` returns."""
    groups = gl.reshape(gl.zeros((WARP_GROUP_ROWS, N), gl.float32, accumulator(N)), (WARP_GROUP_ROWS, N // ORDER, 8, 4, 2))
    largest = gl.max(gl.max(gl.max(gl.max(groups, 4), 3), 2), 1)
    sums = gl.sum(gl.sum(gl.sum(groups, 4, keep_dims=True), 2, keep_dims=True), 1, keep_dims=True)
    return gl.full_like(largest, float("-inf")), gl.full_like(sums, 0.0)
