"""Launches of kernels that are called so often, with so little to do, that finding the compiled kernel would take longest."""

from __future__ import annotations

from typing import Any

import torch
import triton

from qat_kernels.triton.nvfp4 import INTERPRET


class PrecompiledKernel:
    """A kernel compiled for its constants and the types of its arguments, on the current device, to be launched again and again.

    Triton's own launch looks at every number (is it 1? a multiple of 16?) and at every global that the kernel uses. This one does
    not. So every number must be in the kernel's `do_not_specialize`; and every pointer must be a multiple of 16, as that of a new
    tensor is, or in `do_not_specialize_on_alignment`.

    Args:
        types: of the arguments in their order: the dtype of a tensor, None for none, 0 for an integer, 0.0 for a float.
        constants: the other parameters, in their order.
        options: of the compiler.
    """

    def __init__(
        self, kernel: triton.JITFunction, types: list[torch.dtype | int | float | None], constants: dict[str, Any], **options: Any
    ) -> None:
        assert [*constants] == kernel.arg_names[len(types) :], "constants in the order of the parameters"
        self._constants = tuple(constants.values())
        self._kernel, self._options = kernel, options
        if not INTERPRET.value:
            self._kernel, self._options = kernel.warmup(*types, *self._constants, grid=(1,), **options), {}

    def __call__(self, grid: tuple[int, int, int], *arguments: torch.Tensor | int | float | None) -> None:
        self._kernel[grid](*arguments, *self._constants, **self._options)
