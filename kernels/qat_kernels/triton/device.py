"""The GPU that kernels run on: its architecture, whether they can run there, and launches on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton

from .nvfp4 import INTERPRET

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
"""Triton's version, major and minor."""
_MIN_ARCH = 80
_HERE = nullcontext()
_OLDEST_TRITON = {range(100, 120): (3, 8)}
"""For some architectures: 3.6 and 3.7 stop with an error at the forward for sm_100, on FP4 units or not."""


def check_device(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run. Under Triton's interpreter they run everywhere."""
    if INTERPRET.value:
        return
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"attention: impl='triton': expected tensors on an NVIDIA GPU, got {device}; use impl='eager'")
    if arch_of(device) < _MIN_ARCH:
        raise ValueError(
            f"attention: impl='triton': expected sm_{_MIN_ARCH} or later, got sm_{arch_of(device)}; use impl='eager'"
        )
    if problem := too_old_triton(arch_of(device)):
        raise ValueError(f"attention: impl='triton': {problem}; use impl='eager'")


def too_old_triton(arch: int) -> str | None:
    """Why the installed Triton cannot compile the kernels for an architecture (80 for sm_80); None if it can."""
    oldest = next((version for archs, version in _OLDEST_TRITON.items() if arch in archs), (0, 0))
    if oldest <= TRITON:
        return None
    expected, got = (".".join(map(str, version)) for version in (oldest, TRITON))
    return f"expected Triton {expected} or later for sm_{arch}, which {got} cannot compile for"


@lru_cache
def arch_of(device: torch.device) -> int:
    """80 for sm_80, and so on. On a CPU, where only the interpreter runs, tiles are those of the smallest architecture."""
    if device.type != "cuda":
        return _MIN_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)


@lru_cache
def why_no_gluon() -> str | None:
    """Why the kernels in Gluon (hopper/) cannot run with the installed Triton, whose Gluon is experimental; None if they can."""
    if INTERPRET.value:
        return "Triton's interpreter does not run Gluon"
    try:
        from .hopper import backward_launch, forward_launch  # noqa: F401
    except (ImportError, AttributeError) as error:
        return f"Triton {'.'.join(map(str, TRITON))} does not have Gluon as the kernels need it ({error})"
    return None


def gluon_version() -> tuple[int, ...] | None:
    """That of Triton, if its Gluon serves."""
    return TRITON if why_no_gluon() is None else None
