"""Launches that cost little: the compiled kernel is looked up once, and then called again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .nvfp4 import INTERPRET

Grid = tuple[int, int, int]


class Pointer:
    """What a kernel is compiled for where it will get a tensor."""

    def __init__(self, dtype: torch.dtype, *, aligned: bool = True) -> None:
        self.dtype = dtype
        self._address = 0 if aligned else 1

    def data_ptr(self) -> int:
        """An address that is a multiple of 16 if that of the tensor will be."""
        return self._address


class Tiles(TensorDescriptor):
    """A tensor [rows, columns] in tiles of some rows, which the hardware can copy by itself.

    Triton's own class, without its checks at every launch: operands are contiguous, and begin at a multiple of 16.
    """

    def __post_init__(self) -> None:
        """Checks nothing."""

    @classmethod
    def of(cls, x: torch.Tensor | None, rows: int) -> Tiles | None:
        """Tiles of `rows` rows."""
        return None if x is None else cls(x, x.shape, x.stride(), [rows, x.shape[1]])

    @classmethod
    def like(cls, dtype: torch.dtype, columns: int, rows: int) -> TensorDescriptor:
        """What a kernel is compiled for where it will get `Tiles.of`."""
        return TensorDescriptor(Pointer(dtype), [rows, columns], [columns, 1], [rows, columns])


class PrecompiledKernel:
    """A kernel compiled for its constants and its arguments, on the current device.

    Triton's own launch looks at every argument (its type; of a number: is it 1? a multiple of 16?) and at every global that the
    kernel uses, which takes longer than many kernels run. This one does not. So what Triton looks at must be the same in all
    launches: numbers as in `arguments`, or in the kernel's `do_not_specialize`; tensors as `Pointer` says.

    Args:
        arguments: in their order: a number as it will be or, if the kernel does not specialize, 0 or 0.0; a dtype or a `Pointer`
            for a tensor; `Tiles.like`; None for none.
        constants: the other parameters, in their order.
        options: of the compiler.
    """

    def __init__(self, kernel: triton.JITFunction, arguments: Sequence[Any], constants: dict[str, Any], **options: Any) -> None:
        assert [*constants] == kernel.arg_names[len(arguments) :], "constants in the order of the parameters"
        self._constants = tuple(constants.values())
        self._kernel, self._options = kernel, options
        if not INTERPRET.value:
            self._kernel, self._options = kernel.warmup(*arguments, *self._constants, grid=(1,), **options), {}

    def __call__(self, grid: Grid, *arguments: torch.Tensor | Tiles | int | float | None) -> Any:
        """Launch it on the current device and stream; returns the compiled kernel."""
        self._kernel[grid](*arguments, *self._constants, **self._options)
        return self._kernel


class Launch(NamedTuple):
    """One launch of a call, all of it but the tensors, which are the first arguments of every kernel."""

    kernel: PrecompiledKernel
    grid: Grid
    numbers: tuple[int | float | None, ...]

    @classmethod
    def of(
        cls,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        tensors: Sequence[Any],
        numbers: Sequence[int | float | None],
        constants: dict[str, Any],
        **options: Any,
    ) -> Launch:
        """A launch of a kernel whose numbers are known; `tensors` as `PrecompiledKernel` takes them, `constants` in any order."""
        numbers = tuple(numbers)
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        ordered = {name: constants[name] for name in names}
        x, y, z = (*grid, 1, 1)[:3]
        compiled = PrecompiledKernel(kernel, [*tensors, *numbers], ordered, enable_fp_fusion=True, **options)
        return cls(compiled, (x, y, z), numbers)

    def __call__(self, *tensors: torch.Tensor | Tiles | None) -> Any:
        """Launch it on the current device and stream; returns the compiled kernel."""
        return self.kernel(self.grid, *tensors, *self.numbers)
