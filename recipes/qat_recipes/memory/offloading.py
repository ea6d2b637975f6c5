"""Keep frozen weights under adapters in CPU memory until they are used: those of the linear layers in repeated blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from .frozen_weights import repeated_blocks

Offload = Literal["layers", "expert"]
"""What stays in CPU memory: each layer until it computes, or all layers of the models that are not in use."""


def offload(what: Offload, models: Sequence[torch.nn.Module], device: torch.device) -> None:
    """Move models with adapters to a device, except the offloaded layers; hooks bring these when a forward pass needs them.

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
    """Group offloading of Diffusers for each single layer: it moves to the device before its forward pass, and back after it.

    The backward pass needs the weights again and keeps them alive: without gradient checkpointing all of them. With it, the
    forward pass of a block runs again, and its weights are freed with the block.

    Offloading whole blocks would not work: PyTorch ends their recomputation with an exception as soon as it has what it needs,
    so the hook that moves them back would not run, and they hold the adapters, whose gradients are on the device. Streams
    prefetch in the order of the forward pass, but the backward pass has another.
    """
    try:
        from diffusers.hooks import apply_group_offloading
    except ImportError as error:
        raise ValueError("lora.offload: layers needs diffusers; pip install it, or leave it out") from error
    for layer in layers:
        apply_group_offloading(layer, onload_device=device, offload_type="leaf_level")


class _Inactive:
    """Layers of one model. Their weights never change, so nothing must be copied back."""

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
    """The hook of one model: first the layers of the others leave the device, then its own come."""

    def __init__(self, own: _Inactive, others: Sequence[_Inactive], device: torch.device) -> None:
        self.own, self.others, self.device = own, others, device

    def __call__(self, module: torch.nn.Module, arguments: Any) -> None:
        for other in self.others:
            other.leave()
        self.own.bring(self.device)


def _frozen_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The linear layers of a model's blocks, without those of adapters."""
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(f"lora.offload: {type(model).__name__} has no blocks that are known to repeat; leave it out")
    layers = [layer for block in blocks for layer in block.modules() if type(layer) is torch.nn.Linear]
    return [layer for layer in layers if not any(parameter.requires_grad for parameter in layer.parameters())]
