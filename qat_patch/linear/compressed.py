"""NVFP4 as compressed-tensors computes and stores it. All computations are in float32, for inputs of every dtype."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from .config import GlobalScale

GROUP_SIZE = 16
_LARGEST = 448.0 * 6.0
"""The largest value: the largest E4M3 scale times the largest code."""


def check_installed(caller: str) -> None:
    """Raise a ValueError if compressed-tensors is not installed."""
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{caller}: needs compressed-tensors; pip install 'qat-patch[linear]'") from error


@functools.cache
def _scheme() -> Any:
    """compressed-tensors' description of NVFP4. Weights and inputs differ only in the source of their scales."""
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme("NVFP4A16", ["Linear"])


def global_scale(amax: float, rule: GlobalScale, *, room: float = 1.0) -> float:
    """The global scale of a tensor whose largest magnitude is `amax`; 1 for zeros.

    For `power_of_two` it is the largest power of two with room * amax * scale <= 448 * 6.
    """
    if amax == 0:
        return 1.0
    if rule == "power_of_two":
        _, exponent = math.frexp(_LARGEST / room / amax)
        return math.ldexp(1.0, min(max(exponent - 1, -100), 100))
    from compressed_tensors.quantization.utils import generate_gparam

    bound = torch.tensor(amax)
    return generate_gparam(-bound, bound).item()


@torch.library.custom_op("qat_patch::fake_quantize_linear", mutates_args=())
def fake_quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """`x` [..., features] rounded to NVFP4 along its last axis and back, in its dtype; the gradient goes straight through.

    Args:
        x: floating-point; the number of features is a multiple of 16.
        scale: the global scale.
    """
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize as round_trip

    flat = x.reshape(-1, x.shape[-1]).float()
    scales, factor = _scales(flat, scale)
    rounded = round_trip(flat, scales, None, _scheme().weights, global_scale=factor)
    return rounded.to(x.dtype, copy=True).view(x.shape)


@fake_quantize.register_fake
def _(x: torch.Tensor, scale: float) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


fake_quantize.register_autograd(lambda ctx, gradient: (gradient, None))


def pack(weight: torch.Tensor, scale: float) -> dict[str, torch.Tensor]:
    """The stored tensors of a weight [out, in], by the last part of their names. They hold exactly `fake_quantize`'s result.

    `weight_packed` uint8 [out, in / 2], with the even code in the low bits; `weight_scale` float8_e4m3fn [out, in / 16];
    `weight_global_scale` float32 [1]. A value is code * weight_scale / weight_global_scale.
    """
    from compressed_tensors.compressors import NVFP4PackedCompressor

    flat = weight.detach().float()
    scales, factor = _scales(flat, scale)
    state = {"weight": flat, "weight_scale": scales, "weight_global_scale": factor}
    return NVFP4PackedCompressor.compress(state, _scheme())


def unpack(state: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in] that `pack` stored, in float32."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    rows, columns = state["weight_packed"].shape
    codes = unpack_fp4_from_uint8(state["weight_packed"], rows, columns * 2, dtype=torch.float32)
    scales = state["weight_scale"].float()
    return dequantize(codes, scales, args=_scheme().weights, dtype=torch.float32, global_scale=state["weight_global_scale"])


def _scales(x: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of the groups of x [rows, features], on E4M3's grid, and the global scale as a tensor."""
    from compressed_tensors.quantization.utils import calculate_qparams

    groups = x.unflatten(-1, (-1, GROUP_SIZE))
    factor = torch.full((1,), scale, device=x.device)
    scales, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), _scheme().weights, global_scale=factor)
    return scales, factor
