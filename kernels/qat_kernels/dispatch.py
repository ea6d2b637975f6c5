"""Which implementation of attention runs, and why not a faster one.

Kernels are imported when they are first asked for: this package works without triton.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import torch

from .arguments import Impl, validate
from .spec import NVFP4, QuantSpec

logger = logging.getLogger(__name__)

SPEED = ("fp4", "triton", "eager")
"""Implementations, the fastest first."""


@contextlib.contextmanager
def needs_triton() -> Iterator[None]:
    """Around imports of kernels: without the package triton a ValueError says what to do."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"attention: the kernels need the package triton ({error}); install it, or use impl='eager'") from error


@lru_cache
def training_kernels() -> ModuleType:
    """`triton/launch.py`.

    Raises:
        ValueError: triton is not installed.
    """
    with needs_triton():
        from .triton import launch
    return launch


@lru_cache
def fp4_kernels() -> ModuleType:
    """`fp4/launch.py`.

    Raises:
        ValueError: triton is not installed.
    """
    with needs_triton():
        from .fp4 import launch
    return launch


@torch.compiler.assume_constant_result
def resolve(device: torch.device, dtype: torch.dtype) -> Impl:
    """What `auto` takes."""
    return "eager" if device.type == "cpu" else _resolve(device, dtype)


@lru_cache
def _resolve(device: torch.device, dtype: torch.dtype) -> Impl:
    """Says once for each device and dtype why a GPU runs the slow one."""
    try:
        if dtype == torch.float64:
            raise ValueError("float64 is for eager only")
        training_kernels().check_device(device)
    except ValueError as reason:
        logger.warning("qat_kernels: attention runs the eager implementation: same numbers, but slow (%s).", reason)
        return "eager"
    return "triton"


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = NVFP4,
    impl: Impl = "auto",
    needs_gradient: bool | None = None,
) -> str:
    """What `attention` with these arguments would run on this device, in words: a line for each implementation.

    Args:
        q, k, v, spec, impl: as for `attention`.
        needs_gradient: whether there is to be a backward pass; default: as `attention` would decide.

    Raises:
        ValueError: as `attention` does for wrong shapes, dtypes or devices.
    """
    validate(q, k, v, spec, None, None, None, "auto")
    if needs_gradient is None:
        needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    chosen = resolve(q.device, q.dtype) if impl == "auto" else impl
    lines = []
    for name in SPEED:
        problem = why_not(name, q.device, q.dtype, needs_gradient)
        if name == chosen:
            state = f"would raise: {problem}" if problem else f"runs, {how(name, q.device, q.shape[-1], spec)}"
        elif problem:
            state = f"cannot run: {problem}"
        else:
            state = f"could run, {how(name, q.device, q.shape[-1], spec)}: pass impl={name!r}"
            if impl == "auto" and SPEED.index(name) < SPEED.index(chosen):
                state += " (`auto` does not take it yet: its speed has not been measured)"
        lines.append(f"{name}: {state}")
    return "\n".join(lines)


def why_not(impl: str, device: torch.device, dtype: torch.dtype, needs_gradient: bool) -> str | None:
    """Why an implementation cannot run, or None."""
    if impl == "eager":
        return None
    if impl == "fp4" and needs_gradient:
        return "it has no gradient"
    if dtype == torch.float64:
        return "float64 is for eager only"
    try:
        training_kernels().check_device(device)
    except ValueError as error:
        return str(error).removeprefix("attention: impl='triton': ")
    return None


def how(impl: str, device: torch.device, head_dim: int, spec: QuantSpec) -> str:
    """What an implementation that can run multiplies with."""
    if impl == "eager":
        return "in PyTorch"
    if impl == "triton":
        return "as fused kernels that multiply the exact FP4 values in 16 bits" + training_kernels().remark(device)
    kernels = fp4_kernels()
    reason = kernels.why_not_native(kernels.arch_of(device), head_dim, spec.pv)
    return (
        f"emulated in BF16, since {reason}" if reason else "on FP4 units (compiled and inspected by its authors, not run there)"
    )
