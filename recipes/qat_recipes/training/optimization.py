"""What moves the weights, and their moving average."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from qat_patch import PatchHandle
from qat_recipes.memory.frozen_weights import repeated_blocks
from qat_recipes.memory.optimizers import make_adamw

from .settings import TrainingSettings

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def make_optimizer(settings: TrainingSettings, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over what is trained."""
    return make_adamw(
        settings.optimizer,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        learning_rate=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=settings.fused_optimizer,
    )


def compile_blocks(model: torch.nn.Module, handle: PatchHandle, backend: str) -> None:
    """Compile the repeated blocks of a model one by one, in place: names in its state_dict stay as they are.

    Raises:
        ValueError: the host library does not say which blocks of this model are repeated.
    """
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"settings.compile: {type(handle.models[0]).__name__} has no blocks that are known to repeat; leave it out"
        )
    for block in blocks:
        block.compile(backend=backend)


class WeightAverage:
    """An exponential moving average of what is trained, by Diffusers' EMAModel; checkpoints hold it too.

    Raises:
        ValueError: weights are sharded, or Diffusers is not installed.
    """

    def __init__(self, model: torch.nn.Module, decay: float, accelerator: Accelerator) -> None:
        if accelerator.is_fsdp2:
            raise ValueError("settings.ema_decay: expected null where weights are sharded over processes")
        try:
            from diffusers.training_utils import EMAModel
        except ImportError as error:
            raise ValueError("settings.ema_decay: needs diffusers; pip install it, or leave ema_decay out") from error
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.average: EMAModel = EMAModel(self.parameters, decay=decay, foreach=True)
        self.average.to(accelerator.device)

    def step(self) -> None:
        """Take the weights in as they are now."""
        self.average.step(self.parameters)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            self.average.restore(self.parameters)
