"""LoRA through PEFT: small matrices beside frozen weights are all that is trained and all that a checkpoint holds."""

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
"""The name of the adapter that is trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Train low-rank adapters instead of the weights."""

    rank: int | None = None
    """Rank of the matrices; required, but for start.use=trained."""
    alpha: float | None = None
    """What the adapters add is scaled by alpha / rank; required, but for start.use=trained."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    base_dtype: Literal["bfloat16", "float32", "float8", "nf4"] | None = None
    """Type of the frozen weights; null: bfloat16 with mixed_precision=bf16, which is 2 bytes a weight, else float32. Adapters are
    float32, and so is what Diffusers keeps in float32. The residual stream has this type too. float8 (e4m3, by Diffusers'
    layerwise casting, with model.gradient_checkpointing) holds the linear layers of the blocks in 1 byte a weight, nf4 (by
    bitsandbytes) in 4 bits and a scale for every 64; the rest is as with null. One process. Losses are measured with these
    weights; an export has those of the model."""
    offload: Offload | None = None
    """Frozen linear layers of the blocks that wait in the memory of the CPU, in one process. layers: each of them until it
    computes, by Diffusers' group offloading, with model.gradient_checkpointing; every step copies all of them four times.
    expert: with model.transformer=both, all of the transformer that is not in use. null: none."""
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of the modules that get adapters, such as [to_q, to_k, to_v, to_out.0, ffn.net.0.proj, ffn.net.2]
    for all linear layers of Wan's blocks; null: the projections of attention."""
    start: StartSettings | None = None
    """Someone's LoRA to start from, such as one of distillation; null: none."""
    export: Literal["merged", "adapters"] = "merged"
    """Export whole weights with the adapters added to them, and those of `start` too, or the trained adapters alone, which name
    the model they belong to. What they were trained beside (start.use=frozen or merged) is not in them: load it too."""
    export_format: Literal["diffusers", "comfyui"] = "diffusers"
    """How exported adapters of a Diffusers model are named: as `pipe.load_lora_weights` reads them, or as ComfyUI does."""

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
    """Freeze a model of Transformers or Diffusers and give it adapters in float32, which add nothing yet but their start.

    Args:
        model: changed in place.
        settings: of the adapters.
        default: target modules where the settings name none.
        seed: of the first values. All processes draw the same ones, and the global generators are left alone.

    Returns:
        The model of Diffusers itself; of Transformers a `peft.PeftModel` around it.

    Raises:
        ValueError: a target is the name of no module, or the LoRA to start from cannot be read or does not fit.
    """
    start = settings.start
    if start is None or start.use != "trained":
        for target in settings.target_modules or default:
            if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
                raise ValueError(f"lora.target_modules: {type(model).__name__} has no module {target}; leave it out")
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
    """Inside, the model computes as if it had no adapters but the frozen one that it started from."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    active = [layer._active_adapter for layer in layers]
    try:
        # `layer.enable_adapters` sets requires_grad too, and sharding looks at that during the first forward pass.
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
    """The names in a model's state_dict of all that is not trained."""
    return model.state_dict().keys() - {name for name, x in model.named_parameters() if x.requires_grad}


def save_adapters_only(accelerator: Accelerator) -> None:
    """Leave frozen weights, which settings.model names, out of checkpoints.

    Sharded models write all of their weights themselves.
    """

    def drop_frozen(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], folder: str | Path) -> None:
        for model, state in zip(models, weights, strict=False):
            for name in names_left_out(model) & state.keys():
                del state[name]

    accelerator.register_save_state_pre_hook(drop_frozen)
