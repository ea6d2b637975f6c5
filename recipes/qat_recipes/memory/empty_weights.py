"""Sharded training: only the first process reads the weights. The others have none until they get their part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.state import AcceleratorState


def receives_weights() -> bool:
    """Whether this process gets its part of the weights from the first one.

    True with FSDP2 and `fsdp_cpu_ram_efficient_loading` in all processes but the first.
    """
    if not AcceleratorState._shared_state:
        return False
    state = AcceleratorState()
    plugin = getattr(state, "fsdp_plugin", None)
    return plugin is not None and bool(plugin.cpu_ram_efficient_loading) and not state.is_main_process


def without_weights(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """A model like that of `from_pretrained`, but with parameters on the meta device; buffers are real.

    `from_pretrained` of Transformers and Diffusers reads all weights in every process, for all settings of Accelerate.
    """
    with init_empty_weights(include_buffers=False):
        model = make().eval()
    if hasattr(model, "tie_weights"):
        # Shared weights were moved one by one, so they must be tied again.
        cast(Any, model).tie_weights()
    return model


def find_by_name(model: torch.nn.Module) -> None:
    """Give a model the method of Transformers' models with which Accelerate finds weights while it distributes them."""
    if hasattr(model, "get_parameter_or_buffer"):
        return

    def get_parameter_or_buffer(name: str) -> torch.Tensor:
        owner, _, last = name.rpartition(".")
        return getattr(model.get_submodule(owner), last)

    cast(Any, model).get_parameter_or_buffer = get_parameter_or_buffer


def reserve_memory(model: torch.nn.Module) -> None:
    """Give parameters on the meta device an address on the CPU, by which Accelerate distinguishes parameters.

    Nothing is ever written there, so it takes no memory. Shared parameters stay shared.
    """
    reserved: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if parameter not in reserved:
                place = torch.empty_like(parameter, device="cpu")
                reserved[parameter] = torch.nn.Parameter(place, requires_grad=parameter.requires_grad)
            module._parameters[name] = reserved[parameter]
