"""Frozen weights under adapters that wait in the memory of the CPU: those of the linear layers in a model's repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from .frozen_weights import repeated_blocks

Offload = Literal["layers", "expert"]
"""What waits: each layer until it computes, or all layers of the models that are not in use."""


def offload(what: Offload, models: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Move models with adapters to a device, but for what waits; hooks bring that when a forward pass needs it.

    Raises:
        ValueError: Diffusers is not installed, or the host library does not say which blocks repeat.
    """
    waiting = [_frozen_layers(model) for model in models]
    ids = {id(parameter) for layers in waiting for layer in layers for parameter in layer.parameters()}
    for model in models:
        for x in (*model.parameters(), *model.buffers()):
            if id(x) not in ids:
                x.data = x.data.to(device)
    if what == "layers":
        for layers in waiting:
            offload_layers(layers, device)
        return
    inactive = [_Inactive(layers) for layers in waiting]
    for model, own in zip(models, inactive, strict=True):
        others = [other for other in inactive if other is not own]
        model.register_forward_pre_hook(_Switch(own, others, device))


def offload_layers(layers: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Group offloading of Diffusers, of each layer by itself: it comes to the device before its forward pass, and leaves after.

    The backward pass needs weights again, and keeps what the forward pass has left behind: without gradient checkpointing all of
    them. With it the forward pass of a block runs once more, and what that leaves behind goes with the block.

    Whole blocks would stay on the device: PyTorch ends their recomputation by an exception, as soon as it has all that it needs,
    and then the hook that moves them away does not run. They hold the adapters too, whose gradients are on the device. Streams
    load ahead in the order of the forward pass, and the backward pass has another.
    """
    try:
        from diffusers.hooks import apply_group_offloading
    except ImportError as error:
        raise ValueError("lora.offload: layers needs diffusers; pip install it, or leave it out") from error
    for layer in layers:
        apply_group_offloading(layer, onload_device=device, offload_type="leaf_level")


class _Inactive:
    """Layers of one model. What they hold never changes, so that nothing has to be copied back."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        parameters = [parameter for layer in layers for parameter in layer.parameters()]
        self.waiting = [(parameter, parameter.data) for parameter in parameters]
        self.is_here = False

    def bring(self, device: torch.device) -> None:
        if not self.is_here:
            for parameter, waiting in self.waiting:
                parameter.data = waiting.to(device)
            self.is_here = True

    def leave(self) -> None:
        if self.is_here:
            for parameter, waiting in self.waiting:
                parameter.data = waiting
            self.is_here = False


class _Switch:
    """The hook of one model: its layers come, those of the others leave first."""

    def __init__(self, own: _Inactive, others: Sequence[_Inactive], device: torch.device) -> None:
        self.own, self.others, self.device = own, others, device

    def __call__(self, module: torch.nn.Module, arguments: Any) -> None:
        for other in self.others:
            other.leave()
        self.own.bring(self.device)


def _frozen_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The linear layers of a model's blocks that no adapter is made of."""
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(f"lora.offload: {type(model).__name__} has no blocks that are known to repeat; leave it out")
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is torch.nn.Linear]
    return [layer for layer in layers if not any(parameter.requires_grad for parameter in layer.parameters())]
