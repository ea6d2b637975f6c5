"""NVFP4 in Triton: what the kernels round with (docs/NUMERICS.md, 1, 2, 6).

The reference is qat_kernels/nvfp4.py, and codes and scales are equal to its own bit for bit. Everything is float32 arithmetic: no
hardware conversion to FP4 or FP8 is needed, which sm_80 does not have and Triton's interpreter gets wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qat_kernels import spec

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels: it has no inline assembly, and rounds differently where a branch says so."""
GROUP = tl.constexpr(spec.GROUP_SIZE)
P_GLOBAL_SCALE = tl.constexpr(spec.P_GLOBAL_SCALE)
_E2M1_MAX = tl.constexpr(spec.E2M1_MAX)
_SCALE_MIN, _SCALE_MAX = tl.constexpr(spec.SCALE_MIN), tl.constexpr(spec.E4M3_MAX)
SCALE_MIN_NORMAL = tl.constexpr(2.0**-6)
_HADAMARD = tl.constexpr(spec.HADAMARD_ENTRY)
ROTATION_GAIN = tl.constexpr(spec.HADAMARD_ENTRY**2)
"""Times the head dim: by how much the rotation enlarges products of Q and K."""
E2M1_ANCHOR, E4M3_ANCHOR = tl.constexpr(2.0**22), tl.constexpr(2.0**20)
"""2^23 spacings of the values of the format between 1 and 2."""
_MUL_F32X2 = tl.constexpr(
    "{ .reg .b64 a, b; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5}; mul.rn.f32x2 a, a, b; mov.b64 {$0, $1}, a; }"
)
_FMA_F32X2 = tl.constexpr(
    "{ .reg .b64 a, b, c; mov.b64 a, {$2, $3}; mov.b64 b, {$4, $5}; mov.b64 c, {$6, $7}; "
    "fma.rn.f32x2 a, a, b, c; mov.b64 {$0, $1}, a; }"
)
_ERROR_ONE, _INV_POW2_BITS = tl.constexpr(float(spec.ERROR_ONE)), tl.constexpr(254 << 23)
_EXPONENT, _MAGNITUDE, _SIGN = tl.constexpr(0x7F800000), tl.constexpr(0x7FFFFFFF), tl.constexpr(-0x80000000)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32. The interpreter multiplies bfloat16 as integers; float32 holds the same values."""
    if INTERPRET:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def cast_rn(x, dtype: tl.constexpr):
    """The nearest values of `dtype`. The interpreter truncates to bfloat16, so its low bits are rounded away before."""
    if INTERPRET and dtype == tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)
    return x.to(dtype)


@triton.jit
def _power_of_two_below(x):
    """2^floor(log2 x) of a normal x > 0: the exponent field alone."""
    return (x.to(tl.int32, bitcast=True) & _EXPONENT).to(tl.float32, bitcast=True)


@triton.jit
def round_to_e4m3(x):
    """The nearest E4M3 value, ties to even, of x >= 0, saturating at 448; NaN is lost (see `round_groups`).

    Adding and subtracting 2^23 spacings leaves a float32 rounded to that spacing, which is an eighth of the power of two
    below the value.
    """
    x = tl.minimum(x, _SCALE_MAX)
    anchor = tl.maximum(_power_of_two_below(x), SCALE_MIN_NORMAL) * E4M3_ANCHOR
    return (x + anchor) - anchor


@triton.jit
def round_to_e2m1(x):
    """The nearest E2M1 value, ties to the even code, of x >= 0, saturating at 6: as above, with half the power of two."""
    x = tl.minimum(x, _E2M1_MAX)
    anchor = tl.maximum(_power_of_two_below(x), 1.0) * E2M1_ANCHOR
    return (x + anchor) - anchor


@triton.jit
def fake_quantize_p(groups, group_max, SAGE: tl.constexpr = False):
    """phi of P~, cut into groups along some axes, where `group_max` has length 1: PF~ * 2688, exact in bfloat16.

    Inputs are in [0, 1], so nothing saturates; a NaN among them is not kept, because it reaches the row's sum too.
    SAGE: codes divide by the scale before its rounding, and there is no smallest scale (docs/NUMERICS.md, 9).
    """
    if SAGE:
        scale = round_to_e4m3(group_max * (P_GLOBAL_SCALE / _E2M1_MAX))
        # What has no scale has no codes; its maximum may be too small to divide by.
        largest = tl.where(scale > 0.0, group_max, 1.0)
        codes = round_p_to_e2m1(groups * encode_scale_of_p(largest, _E2M1_MAX * E2M1_ANCHOR))
        return tl.where(scale > 0.0, codes * scale, 0.0)
    else:
        scale = scale_of_p(group_max)
        return round_p_to_e2m1(groups * encode_scale_of_p(scale, P_GLOBAL_SCALE * E2M1_ANCHOR)) * scale


@triton.jit
def scale_of_p(group_max):
    """The scale of groups of P~ with these maxima: E4M3 of P~ * 2688 / 6.

    Values are rounded by adding and subtracting x * 2^20, whose spacing is that of E4M3 around x: one operation less than with
    the power of two below x. Ties, whose last bits are zeros, go to the even code all the same; only the one float32 just
    below a power of two becomes the code below it, once in some 2^23 values. `round_p_to_e2m1` does the same with x * 2^22.
    """
    scaled = group_max * (P_GLOBAL_SCALE / _E2M1_MAX * E4M3_ANCHOR)
    anchor = tl.maximum(scaled, SCALE_MIN_NORMAL * E4M3_ANCHOR)
    return tl.maximum((scaled * (1.0 / E4M3_ANCHOR) + anchor) - anchor, _SCALE_MIN)


@triton.jit
def encode_scale_of_p(scale, NUMERATOR: tl.constexpr):
    """NUMERATOR / scale, rounded correctly, because that decides ties; NUMERATOR is 2688 or 6, or a power of two times that."""
    whole = tl.zeros_like(scale) + NUMERATOR
    if INTERPRET:
        return whole / scale
    else:
        inverse = reciprocal(scale)
        quotient = inverse * NUMERATOR
        return tl.fma(tl.fma(-scale, quotient, whole), inverse, quotient)


@triton.jit
def round_p_to_e2m1(scaled):
    """The E2M1 value of P~ * 2688 / scale, given E2M1_ANCHOR times that."""
    anchor = tl.maximum(scaled, E2M1_ANCHOR)
    return (scaled * (1.0 / E2M1_ANCHOR) + anchor) - anchor


@triton.jit
def reciprocal(x):
    """1 / x to an ulp, in one instruction."""
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def mul(a, b, F32X2: tl.constexpr):
    """a b. F32X2: two products by one instruction, which sm_100 has."""
    if F32X2:
        return tl.inline_asm_elementwise(_MUL_F32X2, "=r,=r,r,r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return a * b


@triton.jit
def mul_sub(a, b, c, F32X2: tl.constexpr):
    """a b - c, likewise; rounded once, as the compiler's fused multiply-add does without F32X2."""
    if F32X2:
        return tl.inline_asm_elementwise(_FMA_F32X2, "=r,=r,r,r,r,r,r,r", [a, b, -c], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return a * b - c


@triton.jit
def _e4m3_scale(amax, CODE_MAX: tl.constexpr, RECIPROCAL: tl.constexpr):
    """E4M3 of amax / CODE_MAX, rounded correctly.

    RECIPROCAL: of amax * RN(1 / CODE_MAX), with no smallest scale.
    """
    if RECIPROCAL:
        return round_to_e4m3(amax * (1.0 / CODE_MAX))
    else:
        code_max = tl.full(amax.shape, CODE_MAX, tl.float32)
        return round_to_e4m3(tl.maximum(_quotient(amax, code_max, 1.0 / CODE_MAX), _SCALE_MIN))


@triton.jit
def _quotient(x, divisor, inverse):
    """x / divisor, rounded correctly where it is normal (Markstein's theorem), given RN(1 / divisor)."""
    if INTERPRET:  # its fused multiply-add rounds twice
        return tl.div_rn(x, divisor)
    quotient = x * inverse
    return tl.fma(tl.fma(quotient, -divisor, x), inverse, quotient)


@triton.jit
def _inverse_of_scale(scale):
    """RN(1 / scale) of an E4M3 value: one step from an ulp beside it, for no inverse of four bits is near a tie."""
    one = tl.full(scale.shape, 1.0, tl.float32)
    if INTERPRET:
        return tl.div_rn(one, scale)
    inverse = reciprocal(scale)
    return tl.fma(tl.fma(-scale, inverse, one), inverse, inverse)


@triton.jit
def _divide(x, scale, RECIPROCAL: tl.constexpr):
    """x / scale, rounded correctly, for 1 % of bfloat16 inputs are exact ties.

    RECIPROCAL: x * RN(1 / scale), and zero where the scale is zero.
    """
    if RECIPROCAL:
        return x * tl.where(scale > 0.0, _inverse_of_scale(tl.maximum(scale, _SCALE_MIN)), 0.0)
    return _quotient(x, scale, _inverse_of_scale(scale))


@triton.jit
def _squared_error(magnitude, scale, exact, inv_pow2, AXIS: tl.constexpr):
    """As in the reference: a sum of floats would depend on which thread holds what, and so on the rest of the kernel."""
    error = tl.minimum(tl.abs(magnitude * scale - exact) * inv_pow2, 0.5)
    return tl.sum((error * error * _ERROR_ONE).to(tl.int32), AXIS, keep_dims=True)


@triton.jit
def round_groups(groups, AXIS: tl.constexpr, FOUR_OVER_SIX: tl.constexpr, RECIPROCAL: tl.constexpr = False):
    """E2M1 magnitudes, E4M3 scales (AXIS has length 1) and whether a group is finite: `quantize` of the reference with g = 1."""
    exact = tl.abs(groups)
    # As integers, magnitudes have the same order, and unlike the maximum of floats this one keeps NaN.
    amax_bits = tl.max(groups.to(tl.int32, bitcast=True) & _MAGNITUDE, AXIS, keep_dims=True)
    finite = amax_bits < _EXPONENT
    amax = tl.where(finite, amax_bits, 0).to(tl.float32, bitcast=True)
    scale = _e4m3_scale(amax, 6.0, RECIPROCAL)
    magnitude = round_to_e2m1(tl.abs(_divide(groups, scale, RECIPROCAL)))
    if FOUR_OVER_SIX:
        scale4 = _e4m3_scale(amax, 4.0, RECIPROCAL)
        magnitude4 = round_to_e2m1(tl.abs(_divide(groups, scale4, RECIPROCAL)))
        inv_pow2 = (-(amax.to(tl.int32, bitcast=True) & _EXPONENT) + _INV_POW2_BITS).to(tl.float32, bitcast=True)
        error4 = _squared_error(magnitude4, scale4, exact, inv_pow2, AXIS)
        smaller = error4 < _squared_error(magnitude, scale, exact, inv_pow2, AXIS)
        scale, magnitude = tl.where(smaller, scale4, scale), tl.where(smaller, magnitude4, magnitude)
    return magnitude, scale, finite


@triton.jit
def signed_values(groups, magnitude, scale, finite):
    """code * scale with the sign of the input, of zeros too; NaN in groups that are not finite."""
    value = magnitude * tl.where(finite, scale, float("nan"))
    sign = groups.to(tl.int32, bitcast=True) & _SIGN
    return (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def e2m1_bits(magnitude):
    """The E2M1 bits of a magnitude, int32: those of the float32 with the same exponent field, subnormal ones too."""
    return (magnitude * 2.0**-126).to(tl.int32, bitcast=True) >> 22


@triton.jit
def e2m1_codes(groups, magnitude, finite):
    """int32 codes, sign << 3 | E2M1 bits: `magnitude` with the sign of the input, or zero in groups that are not finite."""
    sign = (groups.to(tl.int32, bitcast=True) >> 31) & 8
    return (e2m1_bits(magnitude) & tl.where(finite, 7, 0)) | sign


@triton.jit
def e4m3_bits(scale, finite):
    """The byte of an E4M3 value: its exponent bias is 120 less than that of float32."""
    bits = (scale * 2.0**-120).to(tl.int32, bitcast=True) >> 20
    return tl.where(finite, bits, 0x7F).to(tl.uint8)


@triton.jit
def e2m1_to_float(code):
    """The float32 of an E2M1 code, int32."""
    bits = ((code & 7) << 22) | ((code & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def e4m3_to_float(bits):
    """The float32 of an E4M3 byte without sign."""
    bits = bits.to(tl.int32)
    return tl.where(bits == 0x7F, float("nan"), (bits << 20).to(tl.float32, bitcast=True) * 2.0**120)


@triton.jit
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """x [ROWS, SIZE] times the Sylvester-Hadamard matrix with entries +-1/8 (symmetric), as log2(SIZE) butterflies.

    Each takes the lowest bit of the column index and puts it back as the highest: after the last one, all columns are
    where they belong.
    """
    for stage in tl.static_range(8):
        if (2 << stage) <= SIZE:
            even, odd = tl.split(tl.reshape(x, (ROWS, SIZE // 2, 2)))
            x = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (0, 2, 1)), (ROWS, SIZE))
    return x * _HADAMARD
