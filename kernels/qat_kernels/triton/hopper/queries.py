"""How the forward rounds Q itself, in pairs of bfloat16: `nvfp4.round_groups` and `signed_values`, the same values.

Only for Q in bfloat16. A value then has 8 bits, a scale 4, and the middle between two codes 3. A tie is a bfloat16, and every
other quotient is more than 1 / 255 away from one. So a quotient that was rounded to bfloat16 gets the code of the exact one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qat_kernels import spec
from qat_kernels.triton.nvfp4 import e4m3_bits, round_to_e4m3

_E2M1_MAX, _SCALE_MIN = gl.constexpr(spec.E2M1_MAX), gl.constexpr(spec.SCALE_MIN)
_NOT_FINITE = gl.constexpr(0x7F80)
"""The bits of infinity; those of NaN are larger."""

# Of a group: 1 / scale in two parts, and the scale, each as a pair. $3: the scale; $4: the same, or NaN.
_PAIRS_OF_GROUP = gl.constexpr("""{
.reg .b32 upper;
.reg .f32 inverse, part;
rcp.approx.ftz.f32 inverse, $3;
cvt.rn.bf16x2.f32 $0, inverse, inverse;
and.b32 upper, $0, 0xFFFF0000;
mov.b32 part, upper;
sub.f32 part, inverse, part;
cvt.rn.bf16x2.f32 $1, part, part;
cvt.rn.bf16x2.f32 $2, $4, $4;
}""")

# Of a pair: E2M1 values. In order: the quotient in bfloat16, at most 6; the power of two below it, at least 1; and the sum with
# 96 times that, whose last bit is worth half of it.
_ROUND_PAIR = gl.constexpr("""{
.reg .b32 x, power;
mul.rn.bf16x2 x, $1, $3;
fma.rn.bf16x2 x, $1, $2, x;
min.xorsign.abs.bf16x2 x, x, $4;
and.b32 power, x, 0x7F807F80;
max.bf16x2 power, power, $5;
fma.rn.bf16x2 x, power, $6, x;
fma.rn.bf16x2 $0, power, $7, x;
}""")

# Of four pairs: a byte of two codes each. A code is the top of a bfloat16 at the smallest exponents, so a product with 2^-126
# makes it. Then its bits and the sign, which are 0, 1, 2 and 9 of both halves, are gathered by a product of bytes with 1, 4, 16
# and 64.
_CODES = gl.constexpr(
    "{ .reg .b32 x, sign; .reg .b32 byte0, byte1, byte2, byte3;"
    + "".join(
        f"mul.rn.bf16x2 x, ${1 + i}, ${13 + i}; and.b32 x, x, ${9 + i}; and.b32 sign, ${5 + i}, 0x80008000; or.b32 x, x, sign;"
        f"shr.u32 x, x, 6; and.b32 x, x, 0x02070207; dp4a.u32.u32 byte{i}, x, 0x40100401, 0;"
        for i in range(4)
    )
    + "prmt.b32 byte0, byte0, byte1, 0x0040; prmt.b32 byte2, byte2, byte3, 0x0040; prmt.b32 $0, byte0, byte2, 0x5410; }"
)


@gluon.jit
def _larger(a, b):
    """The larger magnitudes of two pairs, with some sign; NaN if there is one."""
    return gl.inline_asm_elementwise(
        "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _scale(pairs):
    """The scale of groups, float32, and whether they are finite: [rows, groups, 1]."""
    largest = gl.reduce(pairs, 2, _larger, keep_dims=True)
    amax = gl.maximum(largest & 0x7FFF, (largest >> 16) & 0x7FFF)
    finite = amax < _NOT_FINITE
    amax = (gl.where(finite, amax, 0) << 16).to(gl.float32, bitcast=True)
    # amax / 6, rounded correctly (Markstein's theorem), because that decides ties.
    sixth = gl.full_like(amax, 1.0 / _E2M1_MAX)
    quotient = amax * sixth
    quotient = gl.fma(gl.fma(gl.full_like(amax, -_E2M1_MAX), quotient, amax), sixth, quotient)
    return round_to_e4m3(gl.maximum(quotient, _SCALE_MIN)), finite


@gluon.jit
def _constant(x, BITS: gl.constexpr):
    """A pair of constants for each of these."""
    return gl.full_like(x, BITS, dtype=gl.int32)


@gluon.jit
def quantize(tile, CODES: gl.constexpr):
    """Q in shared memory [rows, D], bfloat16, becomes QF.

    With CODES, codes and scales are returned: uint8 [rows, D / 2] and [rows, D / 16].

    A thread reads and writes whole groups, and no other thread the same ones. Whoever multiplies next has to wait for all.
    """
    ROWS: gl.constexpr = tile.shape[0]
    WORDS: gl.constexpr = tile.shape[1] // 2
    memory: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2)
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    words = tile._reinterpret(gl.int32, [ROWS, WORDS], memory)
    x = words.load(layout)
    pairs = gl.reshape(x, (ROWS, WORDS // 8, 8))
    scale, finite = _scale(pairs)
    inverse, rest, factor = gl.inline_asm_elementwise(
        _PAIRS_OF_GROUP, "=&r,=&r,=&r,r,r", [scale, gl.where(finite, scale, float("nan"))],
        dtype=(gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    rounded = gl.inline_asm_elementwise(
        _ROUND_PAIR, "=r,r,r,r,r,r,r,r",
        [pairs, inverse, rest, _constant(scale, 0x40C040C0), _constant(scale, 0x3F803F80), _constant(scale, 0x42C042C0),
         _constant(scale, -0x3D3F3D40)],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    values = gl.inline_asm_elementwise(
        "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [rounded, factor], dtype=gl.int32, is_pure=True, pack=1
    )
    words.store(gl.convert_layout(gl.reshape(values, (ROWS, WORDS)), layout, assert_trivial=True))
    if CODES:
        codes = gl.inline_asm_elementwise(
            _CODES, "=r" + ",r" * 16, [rounded, pairs, gl.where(finite, 0x01C001C0, 0), _constant(scale, 0x00800080)],
            dtype=gl.uint8, is_pure=True, pack=4,
        )  # fmt: skip
        codes = gl.convert_layout(gl.reshape(codes, (ROWS, WORDS)), layout, assert_trivial=True)
        return codes, gl.reshape(e4m3_bits(scale, finite), (ROWS, WORDS // 8))
    else:
        return x, x
