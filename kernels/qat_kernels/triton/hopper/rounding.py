"""How P~ is rounded on Hopper: `nvfp4.fake_quantize_p` for the layouts of its accumulators."""

from __future__ import annotations

import struct

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from qat_kernels.spec import E2M1_MAX, SCALE_MIN
from qat_kernels.spec import P_GLOBAL_SCALE as _P_GLOBAL_SCALE
from qat_kernels.triton.nvfp4 import (
    E2M1_ANCHOR,
    E4M3_ANCHOR,
    P_GLOBAL_SCALE,
    SCALE_MIN_NORMAL,
    reciprocal,
    round_p_to_e2m1,
    scale_of_p,
)


@gluon.jit
def _mul_bf16x2(a, b):
    """a b of bfloat16 values, two by one instruction; rounded to the nearest."""
    return gl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def quantize_p(p, group_max):
    """`nvfp4.fake_quantize_p` in bfloat16: PF~ * 2688. A code (2 bits) times a scale (4 bits) is exact there, as in float32."""
    scale = scale_of_p(group_max)
    # `nvfp4.encode_scale_of_p`, whose constant tensor needs a layout here.
    inverse = reciprocal(scale)
    quotient = inverse * (P_GLOBAL_SCALE * E2M1_ANCHOR)
    whole = gl.full_like(scale, P_GLOBAL_SCALE * E2M1_ANCHOR)
    codes = round_p_to_e2m1(p * gl.fma(gl.fma(-scale, quotient, whole), inverse, quotient))
    return _mul_bf16x2(codes.to(gl.bfloat16), scale.to(gl.bfloat16))


def _float(value: float) -> str:
    """A float32 constant of PTX."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _scales_of() -> tuple[str, str]:
    """PTX that turns maxima of columns into gains and scales, for `quantize_p_along_rows`, and its constraints."""
    gains, scales = [f"${i}" for i in range(16)], [f"${16 + i}" for i in range(8)]
    lines = ["{", ".reg .b32 lane, bit, source, pair;", ".reg .pred upper;"]
    lines += [f".reg .f32 {', '.join(f'{name}{i}' for i in range(8))};" for name in ("keep", "send", "got", "m")]
    lines += [".reg .f32 lifted, anchor, scale0, scale1, inverse, gain0, gain1, rest;", "mov.u32 lane, %laneid;"]
    # Reduce-scatter: at each of three steps a lane gives half of its columns away, and keeps the maxima of the other half.
    have = [f"${24 + i}" for i in range(16)]
    for distance in (16, 8, 4):
        half = len(have) // 2
        lines += [f"and.b32 bit, lane, {distance};", "setp.ne.u32 upper, bit, 0;"]
        for i in range(half):
            lines += [f"selp.f32 send{i}, {have[i]}, {have[i + half]}, upper;"]
            lines += [f"selp.f32 keep{i}, {have[i + half]}, {have[i]}, upper;"]
        lines += [f"shfl.sync.bfly.b32 got{i}, send{i}, {distance}, 0x1f, 0xffffffff;" for i in range(half)]
        lines += [f"max.f32 m{i}, keep{i}, got{i};" for i in range(half)]
        have = [f"m{i}" for i in range(half)]
    # nvfp4.scale_of_p and encode_scale_of_p.
    whole = _float(_P_GLOBAL_SCALE * E2M1_ANCHOR.value)
    for i in range(2):
        lines += [
            f"mul.f32 lifted, m{i}, {_float(_P_GLOBAL_SCALE / E2M1_MAX * E4M3_ANCHOR.value)};",
            f"max.f32 anchor, lifted, {_float(SCALE_MIN_NORMAL.value * E4M3_ANCHOR.value)};",
            f"fma.rn.f32 scale{i}, lifted, {_float(1 / E4M3_ANCHOR.value)}, anchor;",
            f"sub.f32 scale{i}, scale{i}, anchor;",
            f"max.f32 scale{i}, scale{i}, {_float(SCALE_MIN)};",
            f"rcp.approx.ftz.f32 inverse, scale{i};",
            f"mul.f32 gain{i}, inverse, {whole};",
            f"neg.f32 rest, scale{i};",
            f"fma.rn.f32 rest, rest, gain{i}, {whole};",
            f"fma.rn.f32 gain{i}, rest, inverse, gain{i};",
        ]
    lines += ["cvt.rn.bf16x2.f32 pair, scale1, scale0;", "and.b32 lane, lane, 3;"]
    for i in range(8):  # lanes 4 i to 4 i + 3 have the columns 8 i to 8 i + 7
        lines += [f"or.b32 source, lane, {4 * i};"]
        for result, value in ((scales[i], "pair"), (gains[2 * i], "gain0"), (gains[2 * i + 1], "gain1")):
            lines += [f"shfl.sync.idx.b32 {result}, {value}, source, 0x1f, 0xffffffff;"]
    # Outputs are written before all inputs are read: they may not share registers.
    return "\n".join([*lines, "}"]), ",".join(["=&r"] * 24 + ["r"] * 16)


_SCALES, _SCALES_CONSTRAINTS = map(gl.constexpr, _scales_of())


@gluon.jit
def quantize_p_along_rows(p):
    """`nvfp4.fake_quantize_p` of P~ [64, 64] with keys along the rows: PF~ * 2688, bfloat16.

    A warp holds the 16 rows of one group, a thread the rows r and r + 8 of 16 columns, which 8 lanes share. Each lane finds the
    gain 2688 2^22 / scale (float32) and the scale (bfloat16) of 2 columns, and hands them round.
    """
    groups = gl.reshape(p, (4, 2, 8, 64))
    largest = gl.max(groups, 1, keep_dims=True)
    gain, scale = gl.inline_asm_elementwise(
        _SCALES, _SCALES_CONSTRAINTS, [largest], dtype=(gl.float32, gl.bfloat16), is_pure=True, pack=16
    )
    codes = round_p_to_e2m1(groups * gain)
    return gl.reshape(_mul_bf16x2(codes.to(gl.bfloat16), scale), (64, 64))
