"""A run that starts from an existing LoRA: merged into the weights, frozen beside the new adapters, or trained further."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype

from .files import LoraFile, LowRank, read_lora

START = "start"
"""The name of the frozen adapter in the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartSettings:
    """An existing LoRA to start from."""

    path: str
    """A .safetensors file, or a folder with one, with the names of PEFT, Diffusers, ComfyUI (`diffusion_model.`) and
    kohya's trainers (`lora_unet_`)."""
    path_2: str | None = None
    """The same for transformer_2, with model.transformer=both."""
    use: Literal["frozen", "merged", "trained"]
    """frozen: it stays unchanged beside the trained adapters. merged: it is added to the weights first. trained: it is trained
    further; rank, alpha and target_modules are its own."""
    strength: float = 1.0
    """Its strength."""

    def __post_init__(self) -> None:
        for name in ("path", "path_2"):
            if (path := getattr(self, name)) is not None and not Path(path).exists():
                raise ValueError(f"lora.start.{name}: there is no {path}; expected a file or a folder")
        if self.strength == 0:
            raise ValueError("lora.start.strength: with 0 the LoRA has no effect; leave lora.start out")


def merge(model: torch.nn.Module, settings: StartSettings) -> None:
    """Add a LoRA to the weights of a model without adapters, computed in float32 and rounded once.

    Raises:
        ValueError: the file cannot be read or does not fit the model.
    """
    lora = read_lora(Path(settings.path))
    _check_fit(model, lora, settings.path)
    weights = dict(model.named_parameters())
    changes = lora.differences | {f"{name}.weight": x.scale * (x.up @ x.down) for name, x in lora.layers.items()}
    with torch.no_grad():
        for name, change in changes.items():
            weights[name].copy_(weights[name].float() + settings.strength * change.to(weights[name].device))


def add_adapter(model: torch.nn.Module, settings: StartSettings, name: str, dropout: float = 0.0) -> torch.nn.Module:
    """Add a LoRA to a model as a PEFT adapter, in float32 and trainable.

    Args:
        model: a model of Diffusers or Transformers; the latter may already be in a PEFT wrapper. It is changed in place.
        settings: the file and its strength, which is multiplied into the second matrices.
        name: the name of the adapter.
        dropout: before it.

    Returns:
        The Diffusers model itself; for Transformers a `peft.PeftModel` around it.

    Raises:
        ValueError: the file cannot be read, does not fit the model, or holds more than low-rank matrices.
    """
    lora = read_lora(Path(settings.path))
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    _check_fit(base, lora, settings.path)
    if lora.differences:
        raise ValueError(
            f"lora.start.use: {settings.path} changes {len(lora.differences)} biases or norms too, "
            f"{next(iter(lora.differences))} for one, which adapters cannot; expected merged, got {settings.use}"
        )
    config = _config(lora, dropout)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, config)
    elif type(model).__module__.startswith("diffusers."):
        cast(Any, model).add_adapter(config, adapter_name=name)
        cast_adapter_dtype(model, name)
    else:
        model = peft.get_peft_model(model, config, adapter_name=name)
    layers = {
        key.removeprefix("base_model.model."): module
        for key, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and name in getattr(module, "lora_A", {})
    }
    if layers.keys() != lora.layers.keys():
        different = sorted(layers.keys() ^ lora.layers.keys())
        raise ValueError(f"lora.start.path: {settings.path} does not fit {type(base).__name__}: {different[0]} for one")
    with torch.no_grad():
        for key, x in lora.layers.items():
            layer: Any = layers[key]
            layer.lora_A[name].weight.copy_(x.down)
            layer.lora_B[name].weight.copy_(settings.strength * x.up)
    return model


def keep_frozen(model: torch.nn.Module, trained: str) -> None:
    """Activate the adapter `START` beside the trained one, but keep it frozen."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            # PEFT's own function activates adapters but makes all of them trainable.
            module._active_adapter = [START, trained]
    for key, parameter in model.named_parameters():
        if f".{START}." in key:
            parameter.requires_grad_(False)
        elif f".{trained}." in key:
            parameter.requires_grad_(True)


def _config(lora: LoraFile, dropout: float) -> peft.LoraConfig:
    """PEFT's config for a file. Layers that differ from most are named in it."""

    def alpha(x: LowRank) -> float:
        return x.scale * len(x.down)

    (rank, _), *_ = Counter(len(x.down) for x in lora.layers.values()).most_common(1)
    (common, _), *_ = Counter(map(alpha, lora.layers.values())).most_common(1)
    return peft.LoraConfig(
        r=rank,
        lora_alpha=common,
        rank_pattern={f"^{re.escape(name)}": len(x.down) for name, x in lora.layers.items() if len(x.down) != rank},
        alpha_pattern={f"^{re.escape(name)}": alpha(x) for name, x in lora.layers.items() if alpha(x) != common},
        target_modules=list(lora.layers),
        lora_dropout=dropout,
    )


def _check_fit(model: torch.nn.Module, lora: LoraFile, path: str) -> None:
    """Raise a ValueError unless every layer of a file is a linear layer of the model with the same sizes."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for name, x in lora.layers.items():
        module: Any = modules.get(name)
        if isinstance(module, BaseTunerLayer):  # our own adapters were added first
            module = module.get_base_layer()
        found = (module.out_features, module.in_features) if isinstance(module, torch.nn.Linear) else None
        expected = (len(x.up), x.down.shape[1])
        if found != expected:
            raise ValueError(
                f"lora.start.path: {path} does not fit {type(model).__name__}: expected a linear layer {name} of {expected[1]} "
                f"inputs and {expected[0]} outputs, got {'none' if found is None else f'{found[1]} and {found[0]}'}"
            )
    for name, change in lora.differences.items():
        if name not in parameters or parameters[name].shape != change.shape:
            raise ValueError(f"lora.start.path: {path} does not fit {type(model).__name__}: it has no {name} of this shape")
