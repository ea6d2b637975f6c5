"""NVFP4 in eager PyTorch: quantize, dequantize, fake-quantize, pack, unpack. docs/NUMERICS.md, section 1, in code.

Values are OCP E2M1 ({0, .5, 1, 1.5, 2, 3, 4, 6} with sign), scales are E4M3, one for each group of 16 consecutive
elements along an axis. All arithmetic is float32, whatever the dtype of the input; float64 input is rounded to it first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .spec import E2M1_MAX, E4M3_MAX, ERROR_ONE, GROUP_SIZE, SCALE_MIN
from .transforms import transformed

_INV_POW2_BITS = 254 << 23
"""Less the exponent bits of a float32, the bits of one over the power of two below it."""


class Quantized(NamedTuple):
    """The result of `quantize`: the value of an element is `e2m1(code) * scale / global_scale`."""

    codes: torch.Tensor
    """uint8, the shape of the input: sign << 3 | E2M1 bits. Unpacked; see `pack`."""
    scales: torch.Tensor
    """float8_e4m3fn, the shape of the input except for `axis`, which has ceil(n / 16) entries."""


def quantize(x: torch.Tensor, *, axis: int = -1, global_scale: float = 1.0, four_over_six: bool = False) -> Quantized:
    """Round `x` to NVFP4 along `axis` (docs/NUMERICS.md, section 1).

    Args:
        x: floating-point tensor of any shape with at least one dimension.
        axis: the axis along which 16 consecutive elements form a group; a last, shorter group is padded with zeros.
        global_scale: g, the factor that `x` is multiplied by before the scales are chosen.
        four_over_six: choose each scale between amax/6 and amax/4 by the smaller sum of squared errors.

    Returns:
        Codes and scales. A group whose largest magnitude is not finite has the scale NaN and codes of magnitude zero.

    Raises:
        ValueError: `x` is not a floating-point tensor with at least one dimension, or `axis` is out of range; or a derivative is
            asked for: rounding has none, and only `attention` stands for one.
    """
    _refuse_derivatives("quantize", x)
    groups = _to_groups(x, axis)
    rounded, scale = _round_groups(groups, global_scale, four_over_six)
    magnitude = rounded.abs().nan_to_num(nan=0.0)
    # The E2M1 bits of {0, .5, 1, 1.5, 2 | 3, 4 | 6} lie on three lines of slope 2, 1 and 1/2, the lowest of which counts.
    bits = torch.minimum(torch.minimum(magnitude * 2, magnitude + 2), magnitude / 2 + 4).to(torch.uint8)
    codes = bits | (torch.signbit(groups).to(torch.uint8) << 3)
    return Quantized(_from_groups(codes, x, axis), scale.squeeze(-1).to(torch.float8_e4m3fn).movedim(-1, axis))


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


def fake_quantize(x: torch.Tensor, *, axis: int = -1, global_scale: float = 1.0, four_over_six: bool = False) -> torch.Tensor:
    """`dequantize(*quantize(x))` in one pass, in the shape and dtype of `x`. With g = 1 it is exact in bfloat16.

    Raises:
        ValueError: as `quantize` does.
    """
    _refuse_derivatives("fake_quantize", x)
    return (scaled_codes(x, axis=axis, global_scale=global_scale, four_over_six=four_over_six) / global_scale).to(x.dtype)


def scaled_codes(x: torch.Tensor, *, axis: int = -1, global_scale: float = 1.0, four_over_six: bool = False) -> torch.Tensor:
    """code * scale in float32, without the division by `global_scale`: six significant bits, exact in bfloat16."""
    rounded, scale = _round_groups(_to_groups(x, axis), global_scale, four_over_six)
    return _from_groups(rounded.mul_(scale), x, axis)


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


def _round_groups(groups: torch.Tensor, global_scale: float, four_over_six: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """E2M1 values (signed, float32, shape of `groups`) and E4M3 scales (float32, [..., 1])."""
    amax = groups.abs().amax(-1, keepdim=True)
    scaled = groups if global_scale == 1.0 else groups * global_scale
    scale = _e4m3_scale(amax, global_scale, E2M1_MAX)
    rounded = _round_to_e2m1(scaled / scale)
    if four_over_six:
        scale4 = _e4m3_scale(amax, global_scale, 4.0)
        rounded4 = _round_to_e2m1(scaled / scale4)
        inv_pow2 = (_INV_POW2_BITS - ((amax * global_scale).view(torch.int32) & 0x7F800000)).view(torch.float32)
        smaller = _squared_error(rounded4, scale4, scaled, inv_pow2) < _squared_error(rounded, scale, scaled, inv_pow2)
        rounded, scale = torch.where(smaller, rounded4, rounded), torch.where(smaller, scale4, scale)
    return rounded, scale


def _e4m3_scale(amax: torch.Tensor, global_scale: float, code_max: float) -> torch.Tensor:
    scale = ((amax * global_scale) / code_max).clamp(SCALE_MIN, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return scale.masked_fill(~amax.isfinite(), torch.nan)


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
