"""Launches that cost little: the compiled kernel is looked up once, and then called again and again."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from .nvfp4 import INTERPRET

Grid = tuple[int, int, int]
Argument = Any
"""What a kernel gets where it takes a pointer: `pointer` of a tensor, or a tuple of them."""
Number = int | float | None | tuple["Number", ...]
_MOST_DESCRIPTORS = 512
"""How many a kernel keeps: PyTorch gives the same addresses again and again."""
_LENGTHS = ("seqlen_q", "seqlen_k")
"""Numbers of kernels that are never compiled as the constant 1. A loop over one key would be unrolled, and ptxas 12.8 then made
code for sm_90 (head dim 32, values of 16) that reads V outside of shared memory: the address comes from the wrong register."""


New = Callable[[], torch.Tensor]
"""Makes a tensor of a known shape. Reading a shape (a `torch.Size`) takes PyTorch longer than finding memory."""


def new(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, stride: tuple[int, ...] | None = None, zeros: bool = False
) -> New:
    """Empty memory, contiguous or with these strides; or contiguous zeros."""
    shape = tuple(shape)
    if zeros:
        return functools.partial(torch.zeros, shape, dtype=dtype, device=device)
    if stride is None:
        stride = torch.empty(shape, device="meta").stride()
    return functools.partial(torch.empty_strided, shape, stride, dtype=dtype, device=device)


def starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where parts of these sizes begin that lie one behind the other, and where the last one ends."""
    *begin, end = itertools.accumulate(sizes, initial=0)
    return begin, end


def pointer(x: torch.Tensor | None) -> Any:
    """What a kernel takes of a tensor: its address (of a tensor, Triton would ask the driver), or under the interpreter itself.

    Whoever launches with it keeps the tensor alive until then.
    """
    return x if x is None or INTERPRET.value else x.data_ptr()


def parts(x: torch.Tensor, begin: Sequence[int]) -> list[Any]:
    """`pointer` of the parts of a tensor of one dimension that begin there."""
    if INTERPRET.value:
        return [x[start:] for start in begin]
    address, size = x.data_ptr(), x.element_size()
    return [address + start * size for start in begin]


class Pointer:
    """What a kernel is compiled for where it will get a tensor."""

    def __init__(self, dtype: torch.dtype, *, aligned: bool = True) -> None:
        self.dtype = dtype
        self.address = 0 if aligned else 1
        """One that is a multiple of 16 if that of the tensor will be."""

    def data_ptr(self) -> int:
        """The address."""
        return self.address


class _Descriptor(TensorDescriptor):
    """Triton's own class, without its checks at every launch: operands are contiguous, and begin at a multiple of 16."""

    def __post_init__(self) -> None:
        """Checks nothing."""


class Tiles(NamedTuple):
    """Where a kernel will get a tensor [rows, columns] in tiles of some rows, which the hardware can copy by itself."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    block_rows: int
    strides: tuple[int, ...] = ()
    """None where it is contiguous."""

    def descriptor(self, base: Argument | Pointer) -> Any:
        """As Triton takes a tensor, or an address, in tiles."""
        rows, columns = self.shape
        return _Descriptor(self.pointer(base), [rows, columns], [columns, 1], [self.block_rows, columns])

    def pointer(self, base: Argument | Pointer) -> Any:
        """What has a `data_ptr`, of an address too."""
        if not isinstance(base, int):
            return base
        pointer = Pointer(self.dtype)
        pointer.address = base
        return pointer


class PrecompiledKernel:
    """A kernel compiled for its constants and its arguments, on the current device.

    Triton's own launch looks at every argument (its type; of a number: is it 1? a multiple of 16?) and at every global that the
    kernel uses, which takes longer than many kernels run. This one does not. So what Triton looks at must be the same in all
    launches. A number is the one in `arguments`, or it is in the kernel's `do_not_specialize`. One that is neither 1 nor a
    multiple of 16 in `arguments` may be any at a launch. Tensors are as `Pointer` says.

    Args:
        arguments: in their order: a number as it will be or, if the kernel does not specialize, 0 or 0.0; a dtype or a `Pointer`
            for a tensor; `Tiles`; None for none.
        constants: the other parameters, in their order.
        options: of the compiler.
    """

    def __init__(self, kernel: triton.JITFunction, arguments: Sequence[Any], constants: dict[str, Any], **options: Any) -> None:
        assert [*constants] == kernel.arg_names[len(arguments) :], "constants in the order of the parameters"
        self._constants = tuple(constants.values())
        self._kernel, self._options = kernel, options
        self._tiles = {place: x for place, x in enumerate(arguments) if isinstance(x, Tiles)}
        self._first_plain = max(self._tiles, default=-1) + 1
        self._described: dict[tuple[Argument, ...], tuple[Any, ...]] = {}
        if not INTERPRET.value:
            given = [x.descriptor(Pointer(x.dtype)) if isinstance(x, Tiles) else x for x in arguments]
            self._kernel, self._options = kernel.warmup(*given, *self._constants, grid=(1,), **options), {}

    def __call__(self, grid: Grid, pointers: tuple[Argument, ...], numbers: tuple[Number, ...] = ()) -> Any:
        """Launch it on the current device and stream; returns the compiled kernel."""
        launcher = self._launcher
        if launcher is None or _is_watched():
            arguments = [self._tiles[n].descriptor(x) if n in self._tiles else x for n, x in enumerate(pointers)]
            self._kernel[grid](*arguments, *numbers, *self._constants, **self._options)
        elif count := self._first_plain:
            in_tiles = pointers[:count]
            described = self._described.get(in_tiles) or self._describe(launcher, in_tiles)
            launcher.launch(grid, *described, *pointers[count:], *numbers, *self._constants)
        else:
            launcher.launch(grid, *pointers, *numbers, *self._constants)
        return self._kernel

    def _describe(self, launcher: _Launcher, pointers: tuple[Argument, ...]) -> tuple[Any, ...]:
        """What the launcher takes in place of the first arguments, the last of which are tiles."""
        arguments: list[Any] = []
        for place, x in enumerate(pointers):
            tiles = self._tiles.get(place)
            arguments += [x] if tiles is None else launcher.described(tiles.descriptor(x), place)
        if len(self._described) >= _MOST_DESCRIPTORS:
            self._described.clear()
        described = self._described[pointers] = tuple(arguments)
        return described

    @functools.cached_property
    def _launcher(self) -> _Launcher | None:
        return None if INTERPRET.value else _Launcher.of(self._kernel, [*self._tiles])


class _Launcher:
    """Triton's launcher in C, without the layers of Python around it, which look at every argument again."""

    def __init__(self, launch: Callable[..., None], tiles: dict[int, Any]) -> None:
        self.launch, self._tiles = launch, tiles
        """Takes grid and arguments. Launches on the current stream of the device for which the kernel was compiled, which is the
        current one."""

    @classmethod
    def of(cls, kernel: Any, places: Sequence[int]) -> _Launcher | None:
        """That of a compiled kernel which takes descriptors at these places; None where Triton has another one than is known."""
        if not isinstance(kernel, CompiledKernel):
            return None
        python = kernel.run  # loads the kernel
        if getattr(python, "gsan_enabled", False) or python.global_scratch_size or python.profile_scratch_size:
            return None
        in_c = inspect.getclosurevars(python.launch).nonlocals["launcher"] if places else python.launch
        device, stream_of = driver.active.get_current_device(), driver.active.get_current_stream
        first: tuple[Any, ...] = kernel.function, python.launch_cooperative_grid, python.launch_pdl
        no_hooks, no_scratch = (None, None, None), (None, None)
        if triton.__version__.startswith("3.6."):
            first = *first, *no_scratch, kernel.packed_metadata, *no_hooks

            def launch(grid: Grid, *arguments: Any) -> None:
                in_c(*grid, stream_of(device), *first, *arguments)

        elif triton.__version__.startswith(("3.8.", "3.9.")):
            first = *first, kernel.packed_metadata, *no_hooks, *no_scratch, python.arg_annotations, python.kernel_signature

            def launch(grid: Grid, *arguments: Any) -> None:
                in_c(*grid, stream_of(device), *first, arguments)

        else:
            return None
        about = kernel.metadata.tensordesc_meta or [None] * len(places)
        return cls(launch, dict(zip(places, about, strict=True)))

    def described(self, descriptor: TensorDescriptor, place: int) -> list[Any]:
        """What the launcher takes in place of a descriptor."""
        from triton.backends.nvidia.driver import make_tensordesc_arg

        rest = () if triton.__version__.startswith("3.6.") else (None,)
        arguments = make_tensordesc_arg(descriptor, self._tiles[place], *rest)
        return [x.address if isinstance(x, Pointer) else x for x in arguments]


def _is_watched() -> bool:
    """Whether a profiler listens to launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Launch(NamedTuple):
    """One launch of a call, all of it but the tensors, which are the first arguments of every kernel."""

    kernel: PrecompiledKernel
    grid: Grid
    numbers: tuple[Number, ...]

    @classmethod
    def of(
        cls,
        kernel: triton.JITFunction,
        grid: tuple[int, ...],
        tensors: Sequence[Any],
        numbers: Sequence[Number],
        constants: dict[str, Any],
        **options: Any,
    ) -> Launch:
        """A launch of a kernel whose numbers are known; `tensors` as in `PrecompiledKernel`, `constants` in any order."""
        numbers = tuple(numbers)
        names = kernel.arg_names[len(tensors) + len(numbers) :]
        ordered = {name: constants[name] for name in names}
        x, y, z = (*grid, 1, 1)[:3]
        of_numbers = kernel.arg_names[len(tensors) :]
        any_length = [2 if x == 1 and name in _LENGTHS else x for name, x in zip(of_numbers, numbers, strict=False)]
        compiled = PrecompiledKernel(kernel, [*tensors, *any_length], ordered, enable_fp_fusion=True, **options)
        return cls(compiled, (x, y, z), numbers)

    def __call__(self, *pointers: Argument) -> Any:
        """Launch it on the current device and stream; returns the compiled kernel."""
        return self.kernel(self.grid, pointers, self.numbers)
