"""Which implementation of attention runs, and why not a faster one.

Kernels are imported on first use: this package works without triton.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import lru_cache
from types import ModuleType

import torch

from . import sageattn3
from .arguments import Features, Impl, asked_of, not_computed, validate
from .spec import INFERENCE_KERNELS, NVFP4, Preset, QuantSpec
from .verdicts import Case, Verdict, Verdicts

logger = logging.getLogger(__name__)

SPEED = ("fp4", "sageattn3", "triton", "sdpa", "eager")
"""Implementations, the fastest first."""


@contextlib.contextmanager
def needs_triton() -> Iterator[None]:
    """Around imports of kernels: if triton is missing, a ValueError says what to do."""
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
def resolve(device: torch.device, dtype: torch.dtype, preset: Preset, packed: bool, asked: tuple[str, ...] = ()) -> Impl:
    """The implementation that `auto` takes; `asked`: which of COMPUTED the call needs."""
    kernel = "sdpa" if _kv_only(preset) else "triton"
    if missing := not_computed(kernel, asked):
        if device.type != "cpu":
            _say_that_it_is_slow(f"{kernel!r} does not compute {', '.join(missing)}")
        return "eager"
    if kernel == "sdpa":
        return "eager" if why_not_sdpa(device, dtype, packed) else "sdpa"
    return "eager" if device.type == "cpu" else _resolve(device, dtype, preset)


@lru_cache
def _kv_only(preset: Preset) -> bool:
    return QuantSpec(preset=preset).kv_only


@lru_cache
def _resolve(device: torch.device, dtype: torch.dtype, preset: Preset) -> Impl:
    """Log once for each device and dtype why a GPU runs the slow implementation."""
    try:
        if dtype == torch.float64:
            raise ValueError("float64 is for eager only")
        if "triton" not in QuantSpec(preset=preset).rules.impls:
            raise ValueError(f"there is no kernel for preset={preset!r}")
        training_kernels().check_device(device)
    except ValueError as reason:
        _say_that_it_is_slow(str(reason))
        return "eager"
    return "triton"


@lru_cache
def _say_that_it_is_slow(reason: str) -> None:
    logger.warning("qat_kernels: attention runs the eager implementation: same numbers, but slow (%s).", reason)


def without_verdicts(
    impl: Impl | Verdicts, device: torch.device, dtype: torch.dtype, preset: Preset, asked: tuple[str, ...] = ()
) -> Impl:
    """The implementation that runs if no kernel for inference is chosen."""
    return resolve(device, dtype, preset, False, asked) if isinstance(impl, Verdicts) or impl == "auto" else impl


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = NVFP4,
    causal: bool = False,
    q_shift: torch.Tensor | None = None,
    window: int | None = None,
    block_size: int = 1,
    prefix: int = 0,
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    impl: Impl | Verdicts = "auto",
    needs_gradient: bool | None = None,
) -> str:
    """Describe what `attention` would run for these arguments on this device: a line for each implementation.

    Args:
        q, k, v, spec, causal, q_shift, window, block_size, prefix, bounds, softcap, sinks, impl: as for `attention`.
        needs_gradient: whether a backward pass will follow; default: as `attention` would decide.

    Raises:
        ValueError: as `attention` does for wrong shapes, dtypes or devices.
    """
    validate(q, k, v, spec, None, None, q_shift, None, "auto")
    features = Features(window, block_size, prefix, bounds, softcap, sinks)
    features.checked(q, spec, "auto", causal=causal, packed=False, k_shift=None)
    asked = asked_of(features, q, v, q_shift)
    if needs_gradient is None:
        differentiable = (q, k, v) if sinks is None else (q, k, v, sinks)
        needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    chosen, verdict = without_verdicts(impl, q.device, q.dtype, spec.preset, asked), None
    kernel = spec.inference_kernel
    if isinstance(impl, Verdicts) and kernel and not not_computed(kernel, asked):
        case = Case(q.shape[-1], causal, spec.to_json(), q.dtype)
        verdict = impl.of(q.device, case)
        if not needs_gradient and impl.take_kernel(q.device, q.dtype, *case[:3], q.shape[2], k.shape[2]):
            chosen = kernel
    is_auto = isinstance(impl, Verdicts) or impl == "auto"

    def words(name: str) -> str:
        described = how(name, q.device, q.shape[-1], spec, verdict)
        if name == "triton":
            hides_keys = causal or "bounds" in asked  # `Mask.hides_keys`
            described += training_kernels().remark(q.device, q.shape[-1], hides_keys, spec, asked, needs_gradient)
        return described

    lines = []
    for name in SPEED:
        if name in ("sageattn3", "sdpa") and name not in spec.rules.impls:
            continue
        problem = why_not(name, q.device, q.dtype, spec, needs_gradient, asked)
        if name == chosen:
            state = f"would raise: {problem}" if problem else f"runs, {words(name)}"
        elif problem:
            state = f"cannot run: {problem}"
        else:
            state = f"could run, {words(name)}: pass impl={name!r}"
            if is_auto and SPEED.index(name) < SPEED.index(chosen):
                why = f"here: {verdict.taken}" if verdict else "yet: its speed has not been measured"
                state += f" (`auto` does not take it {why})"
        lines.append(f"{name}: {state}")
    return "\n".join(lines)


def why_not_sdpa(device: torch.device, dtype: torch.dtype, packed: bool) -> str | None:
    """Why PyTorch's own attention cannot run, or None."""
    if packed and (device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16)):
        return "PyTorch packs sequences on a GPU in 16 bits only"
    return None


def why_not(
    impl: str, device: torch.device, dtype: torch.dtype, spec: QuantSpec, needs_gradient: bool, asked: tuple[str, ...] = ()
) -> str | None:
    """Why an implementation cannot run, or None; `asked` as in `resolve`."""
    if impl == "eager":
        return None
    if impl not in spec.rules.impls:
        return f"it does not compute preset={spec.preset!r}"
    if missing := not_computed(impl, asked):
        return f"it does not compute {', '.join(missing)}"
    if impl == "sdpa":
        return None
    if impl in INFERENCE_KERNELS and needs_gradient:
        return "it has no gradient"
    if dtype == torch.float64:
        return "float64 is for eager only"
    try:
        training_kernels().check_device(device)
    except ValueError as error:
        return str(error).removeprefix("attention: impl='triton': ")
    return sageattn3.why_not(device, dtype) if impl == "sageattn3" else None


def on_fp4_units(device: torch.device, head_dim: int, dtype: torch.dtype, spec: QuantSpec) -> bool:
    """Whether a spec's kernel for inference can run on this device and uses FP4 units there."""
    kernel = spec.inference_kernel
    if kernel is None or why_not(kernel, device, dtype, spec, False) is not None:
        return False
    if kernel == "sageattn3":
        return True
    kernels = fp4_kernels()
    return kernels.why_not_native(kernels.arch_of(device), head_dim, spec.quantizes_pv) is None


def how(impl: str, device: torch.device, head_dim: int, spec: QuantSpec, verdict: Verdict | None = None) -> str:
    """How an implementation that can run multiplies, in words."""
    if impl == "eager":
        return "in PyTorch"
    if impl == "sdpa":
        return "as PyTorch's own attention, with K and V fake-quantized"
    if impl == "triton":
        return "as fused kernels that multiply the exact FP4 values in 16 bits"
    if impl == "sageattn3":
        checked = f"checked here: {verdict.words}" if verdict else "never run by the authors of this package"
        found = sageattn3.installed()
        return f"by {found.name if found else 'SageAttention3'} on FP4 units ({checked})"
    kernels = fp4_kernels()
    reason = kernels.why_not_native(kernels.arch_of(device), head_dim, spec.quantizes_pv)
    checked = f"checked here: {verdict.words}" if verdict else "compiled and inspected by its authors, not run there"
    if reason:
        return f"emulated in BF16, since {reason}" + (f" ({checked})" if verdict else "")
    return f"on FP4 units ({checked})"
