"""The GPU that kernels run on: its architecture, whether they can run there, and launches on it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch

from .nvfp4 import INTERPRET

_MIN_ARCH = 80


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


@lru_cache
def arch_of(device: torch.device) -> int:
    """80 for sm_80, and so on. On a CPU, where only the interpreter runs, tiles are those of the smallest architecture."""
    if device.type != "cuda":
        return _MIN_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
