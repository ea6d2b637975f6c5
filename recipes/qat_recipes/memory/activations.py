"""Keep in CPU memory what the backward pass needs, until it needs it."""

from __future__ import annotations

import torch
from torch.autograd.graph import saved_tensors_hooks


def activations_on_cpu() -> saved_tensors_hooks:
    """A context: tensors that are saved for the backward pass in it wait in pinned CPU memory.

    Transposed tensors come back transposed. `torch.autograd.graph.save_on_cpu` makes them contiguous, and the matrix products of
    the backward pass may round otherwise with another layout.
    """
    return saved_tensors_hooks(_to_cpu, _back)


def _to_cpu(x: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    # It keeps the order of the strides; a view with gaps, or an expanded one, becomes dense.
    return x.device, torch.empty_like(x, device="cpu", pin_memory=x.is_cuda).copy_(x)


def _back(saved: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    device, x = saved
    return x.to(device, non_blocking=True)
