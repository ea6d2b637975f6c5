"""LoRA through PEFT: only small matrices beside frozen weights are trained and saved in checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer, cast_adapter_dtype

from qat_recipes.lora.start import START, StartSettings, keep_frozen, merge
from qat_recipes.lora.start import add_adapter as add_existing_adapter
from qat_recipes.memory.frozen_weights import hold_in_float8, hold_in_nf4, known_to_peft
from qat_recipes.memory.offloading import Offload

OWN = "default"
"""The name of the trained adapter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Train low-rank adapters instead of the weights."""

    rank: int | None = None
    """Rank of the matrices; required, except with start.use=trained."""
    alpha: float | None = None
    """The adapters' output is scaled by alpha / rank; required, except with start.use=trained."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    base_dtype: Literal["bfloat16", "float32", "float8", "nf4"] | None = None
    """Type of the frozen weights, and of the residual stream. null: bfloat16 (2 bytes per weight) with mixed_precision=bf16, else
    float32. Adapters, and weights that Diffusers keeps in float32, are float32. float8 (e4m3, by Diffusers' layerwise casting,
    with model.gradient_checkpointing) stores the linear layers of the blocks in 1 byte per weight, nf4 (by bitsandbytes) in 4
    bits and a scale for every 64; the rest is as with null. Both need a single process. Losses are measured with these weights;
    an export has the original ones."""
    offload: Offload | None = None
    """Keep frozen linear layers of the blocks in CPU memory, in a single process. layers: each until it computes, by Diffusers'
    group offloading, with model.gradient_checkpointing; every step copies all of them four times. expert: with
    model.transformer=both, those of the transformer that is not in use. null: none."""
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of the modules that get adapters, such as [to_q, to_k, to_v, to_out.0, ffn.net.0.proj, ffn.net.2]
    for all linear layers of Wan's blocks; null: the projections of attention."""
    start: StartSettings | None = None
    """An existing LoRA to start from, such as one for few-step sampling; null: none."""
    export: Literal["merged", "adapters"] = "merged"
    """Export whole weights with the adapters (and those of `start`) added to them, or only the trained adapters, which name their
    base model. A LoRA that they were trained beside (start.use=frozen or merged) is not in them: load it too."""
    export_format: Literal["diffusers", "comfyui"] = "diffusers"
    """The names in exported adapters of a Diffusers model: those for `pipe.load_lora_weights`, or ComfyUI's."""

    def __post_init__(self) -> None:
        own = ("rank", "alpha", "target_modules")
        if self.start is not None and self.start.use == "trained":
            if given := [name for name in own if getattr(self, name) is not None]:
                raise ValueError(f"lora.{given[0]}: with start.use=trained it is that of {self.start.path}; leave it out")
        elif missing := next((name for name in own[:2] if getattr(self, name) is None), None):
            raise ValueError(f"lora: {missing!r} is missing; set it in the file or as an argument")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank: expected at least 1, got {self.rank}")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"lora.alpha: expected a positive number, got {self.alpha}")
        if self.export == "merged" and self.export_format != "diffusers":
            raise ValueError("lora.export_format: comfyui is for adapters alone; set lora.export to adapters, or leave it out")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout: expected a number in [0, 1), got {self.dropout}")
        if self.target_modules == ():
            raise ValueError("lora.target_modules: expected names of modules, or null, got an empty list")


def add_adapters(model: torch.nn.Module, settings: LoraSettings, default: tuple[str, ...], seed: int) -> torch.nn.Module:
    """Freeze a model of Transformers or Diffusers and add float32 adapters. Until they are trained only `start` has an effect.

    Args:
        model: changed in place.
        settings: the settings of the adapters.
        default: the target modules, if the settings name none.
        seed: seed of the initial values. All processes draw the same, and the global generators do not change.

    Returns:
        The Diffusers model itself; for Transformers a `peft.PeftModel` around it.

    Raises:
        ValueError: a target matches no module, or the LoRA to start from cannot be read or does not fit.
    """
    start = settings.start
    if start is None or start.use != "trained":
        for target in settings.target_modules or default:
            if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
                linear = dict.fromkeys(
                    x.rpartition(".")[2] for x, module in model.named_modules() if isinstance(module, torch.nn.Linear)
                )
                remedy = "leave it out" if settings.target_modules else "null means that one too; name those of its attention"
                raise ValueError(
                    f"lora.target_modules: {type(model).__name__} has no module {target}; {remedy} (its linear layers are "
                    f"{', '.join(linear)})"
                )
    if start is not None and start.use == "merged":
        merge(model, start)
    if settings.base_dtype == "nf4":
        hold_in_nf4(model)
    with torch.random.fork_rng(), known_to_peft(model) if settings.base_dtype == "nf4" else contextlib.nullcontext():
        torch.manual_seed(seed)
        model.requires_grad_(False)
        model = _with_adapters(model, settings, default)
    if settings.base_dtype == "float8":
        hold_in_float8(model)
    return model


def _with_adapters(model: torch.nn.Module, settings: LoraSettings, default: tuple[str, ...]) -> torch.nn.Module:
    start = settings.start
    if start is not None and start.use == "trained":
        return add_existing_adapter(model, start, OWN, settings.dropout)
    assert settings.rank is not None and settings.alpha is not None  # checked by the settings
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules or default),
    )
    if not type(model).__module__.startswith("diffusers."):
        model = peft.get_peft_model(model, config)
    else:
        cast(Any, model).add_adapter(config)
        # PEFT does so for the other.
        cast_adapter_dtype(model, OWN)
    if start is not None and start.use == "frozen":
        model = add_existing_adapter(model, start, START)
        keep_frozen(model, OWN)
    return model


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether any module of the model has adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model computes without adapters, except the frozen one that it started from."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = [layer._active_adapter for layer in layers]
    try:
        # `layer.enable_adapters` would also set requires_grad, which sharding reads during the first forward pass.
        for layer in layers:
            if START in layer.active_adapters:
                layer._active_adapter = [START]
            else:
                layer._disable_adapters = True
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter, layer._disable_adapters = names, False


def names_left_out(model: torch.nn.Module) -> set[str]:
    """The names of all untrained entries in a model's state_dict."""
    return model.state_dict().keys() - {name for name, x in model.named_parameters() if x.requires_grad}


def save_adapters_only(accelerator: Accelerator) -> None:
    """Leave frozen weights out of checkpoints: settings.model names them.

    Sharded models still write all their weights.
    """

    def drop_frozen(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str | Path) -> None:
        for model, state in zip(models, weights, strict=False):
            for name in names_left_out(model) & state.keys():
                del state[name]

    accelerator.register_save_state_pre_hook(drop_frozen)
