"""Launches of kernels that are called so often, with so little to do, that finding the compiled kernel would take longest."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton

from ._nvfp4 import INTERPRET


def launch(
    kernel: triton.JITFunction, grid: tuple[int, int, int], arguments: tuple, constants: dict[str, Any], **options: Any
) -> None:
    """As `kernel[grid](*arguments, **constants, **options)`, for a kernel that is compiled for the types of its arguments alone.

    Triton's own launch looks at every value (is it 1? a multiple of 16?) and at every global that the kernel uses; this one looks
    at types. So every number must be in the kernel's `do_not_specialize`; and its pointers must be multiples of 16, as those of
    new tensors are, or in `do_not_specialize_on_alignment`. The first argument is on the current device.
    """
    if INTERPRET.value:
        kernel[grid](*arguments, **constants, **options)
        return
    types = tuple([x if x is None else getattr(x, "dtype", type(x)) for x in arguments])
    compiled = _compiled(kernel, arguments[0].device, types, tuple(constants.items()), tuple(options.items()))
    compiled[grid](*arguments, *constants.values())


@cache
def _compiled(
    kernel: triton.JITFunction, device: torch.device, types: tuple, constants: tuple[tuple[str, Any], ...], options: tuple
) -> triton.compiler.CompiledKernel:
    assert [name for name, _ in constants] == kernel.arg_names[len(types) :], "constants in the order of the parameters"
    samples = [x() if x in (int, float) else x for x in types]
    return kernel.warmup(*samples, *(value for _, value in constants), grid=(1,), **dict(options))
