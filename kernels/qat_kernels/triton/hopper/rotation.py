"""The rotation of gradients on Hopper: `nvfp4.hadamard` for the layout of accumulators."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qat_kernels.spec import HADAMARD_ENTRY

from .pipeline import WARP_GROUP_ROWS, accumulator

_ENTRY = gl.constexpr(HADAMARD_ENTRY)


@gluon.constexpr_function
def _from_lane(distance):
    """PTX that gives a lane the value of the one whose number differs in this bit."""
    return f"shfl.sync.bfly.b32 $0, $1, {distance}, 0x1f, 0xffffffff;"


@gluon.jit
def _butterfly(grad, WIDTH: gl.constexpr):
    """Sums and differences of the columns whose numbers differ by WIDTH, in their places.

    Of eight columns each of four lanes holds two neighbours: the other column is in the lane itself, or in another one.
    """
    D: gl.constexpr = grad.shape[1]
    if WIDTH == 2 or WIDTH == 4:
        other = gl.inline_asm_elementwise(_from_lane(WIDTH // 2), "=r,r", [grad], dtype=gl.float32, is_pure=True, pack=1)
        column = gl.arange(0, D, gl.SliceLayout(0, accumulator(D)))
        grad = other + grad * gl.where((column & WIDTH) == 0, 1.0, -1.0)[None, :]  # the product is exact
    else:
        even, odd = gl.split(gl.permute(gl.reshape(grad, (WARP_GROUP_ROWS, D // (2 * WIDTH), 2, WIDTH)), (0, 1, 3, 2)))
        pairs = gl.permute(gl.join(even + odd, even - odd), (0, 1, 3, 2))
        grad = gl.convert_layout(gl.reshape(pairs, (WARP_GROUP_ROWS, D)), accumulator(D), assert_trivial=True)
    return grad


@gluon.jit
def rotate_back(grad):
    """dQ or dK [64, D] of a warp group times the Hadamard matrix: the sums of `nvfp4.hadamard` in the same order."""
    for stage in gl.static_range(7):
        if (1 << stage) < grad.shape[1]:
            grad = _butterfly(grad, 1 << stage)
    return grad * _ENTRY
