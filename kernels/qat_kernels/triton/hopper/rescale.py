"""What the Hopper forward multiplies its sums by when the row maxima change."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


# fmt: off
@gluon.jit
def _rescale_32(
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23, a24, a25, a26,
    a27, a28, a29, a30, a31, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15, s16, s17, s18, s19, s20, s21,
    s22, s23, s24, s25, s26, s27, s28, s29, s30, s31,
):
    if (s0 != 1.0) | (s2 != 1.0):
        (
            a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23, a24,
            a25, a26, a27, a28, a29, a30, a31,
        ) = (
            a0 * s0, a1 * s0, a2 * s2, a3 * s2, a4 * s0, a5 * s0, a6 * s2, a7 * s2, a8 * s0, a9 * s0, a10 * s2, a11 * s2, a12 *
            s0, a13 * s0, a14 * s2, a15 * s2, a16 * s0, a17 * s0, a18 * s2, a19 * s2, a20 * s0, a21 * s0, a22 * s2, a23 * s2,
            a24 * s0, a25 * s0, a26 * s2, a27 * s2, a28 * s0, a29 * s0, a30 * s2, a31 * s2,
        )
    return (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23, a24, a25,
        a26, a27, a28, a29, a30, a31,
    )
# fmt: on


@gluon.jit
def rescale(out, factor):
    """out [64, D] * factor [64, 1]. Integer maxima seldom change, so a thread whose factors are 1 jumps over its products.

    A jump of the whole warp group would need a reduction over it. The accumulator's layout gives a thread the columns 2 t and
    2 t + 1 of every eight, of one row and then of the row 8 below: its factors are s0 and s2.
    """
    return gl.map_elementwise(_rescale_32, out, factor, pack=32)[0]
