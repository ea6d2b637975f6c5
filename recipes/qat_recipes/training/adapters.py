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


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Train low-rank adapters instead of the weights."""

    rank: int
    """Rank of the matrices."""
    alpha: float
    """What the adapters add is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    base_dtype: Literal["bfloat16", "float32"] | None = None
    """Type of the frozen weights; null: bfloat16 with mixed_precision=bf16, which is 2 bytes a weight, else float32. Adapters are
    float32, and so is what Diffusers keeps in float32. The residual stream has this type too."""
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of the modules that get adapters; null: the projections of attention."""
    export: Literal["merged", "adapters"] = "merged"
    """Export whole weights with the adapters added to them, or the adapters alone, which name the model they belong to."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank: expected at least 1, got {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"lora.alpha: expected a positive number, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout: expected a number in [0, 1), got {self.dropout}")
        if self.target_modules == ():
            raise ValueError("lora.target_modules: expected names of modules, or null, got an empty list")


def add_adapters(model: torch.nn.Module, settings: LoraSettings, default: tuple[str, ...], seed: int) -> torch.nn.Module:
    """Freeze a model of Transformers or Diffusers and give it adapters in float32, which change nothing yet.

    Args:
        model: changed in place.
        settings: of the adapters.
        default: target modules where the settings name none.
        seed: of the first values. All processes draw the same ones, and the global generators are left alone.

    Returns:
        The model of Diffusers itself; of Transformers a `peft.PeftModel` around it.

    Raises:
        ValueError: a target is the name of no module.
    """
    targets = settings.target_modules or default
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in model.named_modules()):
            raise ValueError(f"lora.target_modules: {type(model).__name__} has no module {target}; leave it out")
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=list(targets)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not type(model).__module__.startswith("diffusers."):
            return peft.get_peft_model(model, config)
        model.requires_grad_(False)
        cast(Any, model).add_adapter(config)
        # PEFT does so for the other.
        cast_adapter_dtype(model, "default")
        return model


def has_adapters(model: torch.nn.Module) -> bool:
    """Whether any module of the model has adapters."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


@contextlib.contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Inside, the model computes as if it had no adapters."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        # `layer.enable_adapters` sets requires_grad too, and sharding looks at that during the first forward pass.
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


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
