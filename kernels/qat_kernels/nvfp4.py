"""NVFP4 in eager PyTorch: quantize, dequantize, fake-quantize, pack, unpack. docs/NUMERICS.md, section 1, in code.

Values are OCP E2M1 ({0, .5, 1, 1.5, 2, 3, 4, 6} with sign), scales are E4M3, one for each group of 16 consecutive
elements along an axis. All arithmetic is float32 for inputs of every dtype; float64 input is rounded to it first.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

from .spec import E2M1_MAX, E4M3_MAX, ERROR_ONE, GROUP_SIZE, P_GLOBAL_SCALE, SCALE_MIN, NVFP4Format, ScaleRule
from .transforms import transformed

_INV_POW2_BITS = 254 << 23
"""Less the exponent bits of a float32, the bits of one over the power of two below it."""


class Quantized(NamedTuple):
    """The result of `quantize`: the value of an element is `e2m1(code) * scale / global_scale`."""

    codes: torch.Tensor
    """uint8, the shape of the input: sign << 3 | E2M1 bits. Unpacked; see `pack`."""
    scales: torch.Tensor
    """float8_e4m3fn, the shape of the input except for `axis`, which has ceil(n / 16) entries."""


def quantize(
    x: torch.Tensor,
    *,
    axis: int = -1,
    global_scale: float = 1.0,
    four_over_six: bool = False,
    scale: ScaleRule = "divide",
) -> Quantized:
    """Round `x` to NVFP4 along `axis` (docs/NUMERICS.md, section 1).

    Args:
        x: floating-point tensor of any shape with at least one dimension.
        axis: the axis along which 16 consecutive elements form a group; a last, shorter group is padded with zeros.
        global_scale: g, the factor that `x` is multiplied by before the scales are chosen.
        four_over_six: choose each scale between amax/6 and amax/4 by the smaller sum of squared errors.
        scale: whether values are divided by scales of at least 2^-9, or multiplied by the reciprocals of scales that may be zero
            (`NVFP4Format`).

    Returns:
        Codes and scales. A group whose largest magnitude is not finite has the scale NaN and codes of magnitude zero.

    Raises:
        ValueError: `x` is not a floating-point tensor with at least one dimension, or `axis` is out of range; or a derivative is
            asked for: rounding has none, and only `attention` stands for one.
    """
    _refuse_derivatives("quantize", x)
    groups = _to_groups(x, axis)
    rounded, scales = _round_groups(groups, global_scale, four_over_six, scale)
    magnitude = rounded.abs().nan_to_num(nan=0.0)
    # The E2M1 bits of {0, .5, 1, 1.5, 2 | 3, 4 | 6} lie on three lines of slope 2, 1 and 1/2, the lowest of which counts.
    bits = torch.minimum(torch.minimum(magnitude * 2, magnitude + 2), magnitude / 2 + 4).to(torch.uint8)
    codes = bits | (torch.signbit(groups).to(torch.uint8) << 3)
    return Quantized(_from_groups(codes, x, axis), scales.squeeze(-1).to(torch.float8_e4m3fn).movedim(-1, axis))


def dequantize(
    codes: torch.Tensor, scales: torch.Tensor, *, axis: int = -1, global_scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values that `quantize` stands for: e2m1(code) * scale / global_scale, in `dtype`.

    Args:
        codes: uint8, as `quantize` returns it (unpacked).
        scales: float8_e4m3fn with ceil(n / 16) entries along `axis`.

    Raises:
        ValueError: the shapes of codes and scales do not belong together.
    """
    size = codes.shape[axis]
    expected = list(codes.shape)
    expected[axis] = -(-size // GROUP_SIZE)
    if list(scales.shape) != expected:
        raise ValueError(
            f"dequantize: scales for codes of shape {tuple(codes.shape)} along axis {axis} must have the shape "
            f"{tuple(expected)}, got {tuple(scales.shape)}"
        )
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    values = table[(codes & 7).long()]
    values = torch.where(codes > 7, -values, values)
    scale = scales.float().repeat_interleave(GROUP_SIZE, dim=axis).narrow(axis, 0, size)
    return (values * scale / global_scale).to(dtype)


def fake_quantize(
    x: torch.Tensor,
    *,
    axis: int = -1,
    global_scale: float = 1.0,
    four_over_six: bool = False,
    scale: ScaleRule = "divide",
) -> torch.Tensor:
    """`dequantize(*quantize(x))` in one pass, in the shape and dtype of `x`. With g = 1 it is exact in bfloat16.

    Raises:
        ValueError: as `quantize` does.
    """
    _refuse_derivatives("fake_quantize", x)
    values = scaled_codes(x, axis=axis, global_scale=global_scale, four_over_six=four_over_six, scale=scale)
    return (values / global_scale).to(x.dtype)


def scaled_codes(
    x: torch.Tensor,
    *,
    axis: int = -1,
    global_scale: float = 1.0,
    four_over_six: bool = False,
    scale: ScaleRule = "divide",
) -> torch.Tensor:
    """code * scale in float32, without the division by `global_scale`: six significant bits, exact in bfloat16."""
    rounded, scales = _round_groups(_to_groups(x, axis), global_scale, four_over_six, scale)
    return _from_groups(rounded.mul_(scales), x, axis)


def in_format(x: torch.Tensor, how: NVFP4Format | Literal["e4m3"] | None) -> torch.Tensor:
    """Q, K or V [..., tokens, D] as a spec has it, in float32; as it is if `how` is None."""
    if how is None:
        return x
    if how == "e4m3":
        return round_to_e4m3(x.float())
    values = scaled_codes(x, axis=-1 if how.axis == "head_dim" else -2, four_over_six=how.four_over_six, scale=how.scale)
    return round_to_e4m3(values) if how.then_e4m3 else values


def p_in_format(p: torch.Tensor, how: Literal["two_level", "sage", "sage_one_level"]) -> tuple[torch.Tensor, float]:
    """Probabilities [..., keys] in [0, 1], quantized along the keys: code * scale in float32, and what they are too large by.

    docs/NUMERICS.md, sections 2, 3 and 9.
    """
    if how == "two_level":
        return scaled_codes(p, global_scale=P_GLOBAL_SCALE), P_GLOBAL_SCALE
    global_scale = 1.0 if how == "sage_one_level" else P_GLOBAL_SCALE
    groups = _to_groups(p, -1)
    amax = groups.amax(-1, keepdim=True)
    scale = (amax * (global_scale / E2M1_MAX)).to(torch.float8_e4m3fn).float()
    # By the scale before its rounding, so that the largest has the code of 6. Groups of zeros have none.
    rounded = _round_to_e2m1(groups * (E2M1_MAX / amax).nan_to_num(posinf=0.0))
    return _from_groups(rounded.mul_(scale), p, -1), global_scale


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 value of float32, ties to even, saturating at 448; NaN stays NaN."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def pack(codes: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    """Two codes a byte along `axis`, the lower index in the low nibble; an odd length is padded with code 0."""
    codes = codes.movedim(axis, -1)
    if codes.shape[-1] % 2:
        codes = F.pad(codes, (0, 1))
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).movedim(-1, axis)


def unpack(packed: torch.Tensor, size: int, *, axis: int = -1) -> torch.Tensor:
    """The inverse of `pack`: `size` codes along `axis`.

    Raises:
        ValueError: `packed` does not hold `size` codes.
    """
    packed = packed.movedim(axis, -1)
    if packed.shape[-1] != -(-size // 2):
        raise ValueError(f"unpack: {size} codes take {-(-size // 2)} bytes along axis {axis}, got {packed.shape[-1]}")
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return codes[..., :size].movedim(-1, axis)


def _refuse_derivatives(name: str, x: torch.Tensor) -> None:
    if transformed() or (torch.is_grad_enabled() and x.requires_grad):
        raise ValueError(
            f"{name}: expected a call without derivatives, got one under torch.func or forward mode, or a tensor that requires a "
            "gradient: rounding has no derivative; detach it, or call under torch.no_grad()"
        )


def _to_groups(x: torch.Tensor, axis: int) -> torch.Tensor:
    """float32 [..., ceil(n / 16), 16] with `axis` moved last."""
    if not x.is_floating_point() or not -x.ndim <= axis < x.ndim:
        raise ValueError(
            f"NVFP4 groups lie along one axis of a floating-point tensor: got {x.dtype}, shape {tuple(x.shape)}, axis {axis}"
        )
    x = x.movedim(axis, -1).float()
    if tail := x.shape[-1] % GROUP_SIZE:
        x = F.pad(x, (0, GROUP_SIZE - tail))
    return x.unflatten(-1, (x.shape[-1] // GROUP_SIZE, GROUP_SIZE))


def _from_groups(groups: torch.Tensor, like: torch.Tensor, axis: int) -> torch.Tensor:
    """The inverse of `_to_groups`: the shape of `like`, padding dropped."""
    return groups.flatten(-2)[..., : like.shape[axis]].movedim(-1, axis)


def _round_groups(
    groups: torch.Tensor, global_scale: float, four_over_six: bool, rule: ScaleRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """E2M1 values (signed, float32, shape of `groups`) and E4M3 scales (float32, [..., 1])."""
    amax = groups.abs().amax(-1, keepdim=True)
    scaled = groups if global_scale == 1.0 else groups * global_scale
    scale, rounded = _round_with(E2M1_MAX, scaled, amax, global_scale, rule)
    if four_over_six:
        scale4, rounded4 = _round_with(4.0, scaled, amax, global_scale, rule)
        inv_pow2 = (_INV_POW2_BITS - ((amax * global_scale).view(torch.int32) & 0x7F800000)).view(torch.float32)
        smaller = _squared_error(rounded4, scale4, scaled, inv_pow2) < _squared_error(rounded, scale, scaled, inv_pow2)
        rounded, scale = torch.where(smaller, rounded4, rounded), torch.where(smaller, scale4, scale)
    return rounded, scale


def _round_with(
    code_max: float, scaled: torch.Tensor, amax: torch.Tensor, global_scale: float, rule: ScaleRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """The E4M3 scale that makes amax `code_max`, NaN where amax is not finite; and the E2M1 values with that scale."""
    if rule == "divide":
        scale = ((amax * global_scale) / code_max).clamp(SCALE_MIN, E4M3_MAX)
    else:
        scale = (amax * global_scale * (1.0 / code_max)).clamp(max=E4M3_MAX)
    scale = scale.to(torch.float8_e4m3fn).float().masked_fill(~amax.isfinite(), torch.nan)
    if rule == "divide":
        return scale, _round_to_e2m1(scaled / scale)
    inverse = (1.0 / scale).masked_fill(scale == 0, 0.0)
    return scale, _round_to_e2m1(scaled * inverse)


def _squared_error(rounded: torch.Tensor, scale: torch.Tensor, exact: torch.Tensor, inv_pow2: torch.Tensor) -> torch.Tensor:
    """The sum over a group, as integers, whose order of adding cannot matter.

    Errors are multiplied by `inv_pow2`, one over the power of two below amax, which leaves at most 1/2 of them, but where values
    saturate or vanish under both scales alike.
    """
    error = ((rounded * scale - exact).abs() * inv_pow2).clamp(max=0.5)
    return (error.square() * ERROR_ONE).to(torch.int32).sum(-1, keepdim=True, dtype=torch.int32)


def _round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to nearest, ties to the even code, saturating at 6. Consumes `x` (float32); NaN stays NaN."""
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    # The spacing of E2M1 is half the power of two below the value, from 1 to 4; adding and subtracting 2^23 spacings
    # leaves a float32 rounded to that spacing, ties to even, which is the even code too.
    power = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_(1.0, 4.0)
    anchor = power.mul_(2.0**22)
    return magnitude.add_(anchor).sub_(anchor).copysign_(x)
