"""The optimizer, compiled blocks, and the moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor, distribute_tensor

from qat_patch import PatchHandle
from qat_recipes.memory.frozen_weights import repeated_blocks
from qat_recipes.memory.optimizers import make_adamw

from .settings import TrainingSettings

if TYPE_CHECKING:
    from diffusers.training_utils import EMAModel


def make_optimizer(settings: TrainingSettings, model: torch.nn.Module) -> torch.optim.Optimizer:
    """AdamW over the trained parameters."""
    return make_adamw(
        settings.optimizer,
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        learning_rate=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=settings.fused_optimizer,
    )


def compile_blocks(handle: PatchHandle, backend: str) -> None:
    """Compile the repeated blocks of patched models one by one, in place. Names in their state_dicts do not change.

    Raises:
        ValueError: the host library does not name the repeated blocks of this model.
    """
    blocks = [block for model in handle.models for block in repeated_blocks(model)]
    if not blocks:
        raise ValueError(
            f"settings.compile: {type(handle.models[0]).__name__} has no blocks that are known to repeat; leave it out"
        )
    for block in blocks:
        block.compile(backend=backend)


class WeightAverage:
    """An exponential moving average of the trained weights, by Diffusers' EMAModel. Checkpoints include it.

    With sharded weights each process averages its own shards; checkpoints hold whole tensors.

    Raises:
        ValueError: Diffusers is not installed.
    """

    def __init__(self, model: torch.nn.Module, decay: float, accelerator: Accelerator) -> None:
        try:
            from diffusers.training_utils import EMAModel
        except ImportError as error:
            raise ValueError("settings.ema_decay: needs diffusers; pip install it, or leave ema_decay out") from error
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.is_writer = accelerator.is_main_process
        self.average: EMAModel = EMAModel(self._here(), decay=decay, foreach=True)
        self.device = accelerator.device
        self.average.to(self.device)

    def step(self) -> None:
        """Update the average with the current weights."""
        self.average.step(self._here())

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        self.average.store(self._here())
        self.average.copy_to(self._here())
        try:
            yield
        finally:
            self.average.restore(self._here())

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors. Only the main process has their values, because only it writes. All processes call this."""
        state = self.average.state_dict()
        pairs = zip(state["shadow_params"], self.parameters, strict=True)
        return state | {"shadow_params": [self._whole(average, parameter) for average, parameter in pairs]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this process's part of the main process's tensors."""
        pairs = zip(state["shadow_params"], self.parameters, strict=True)
        self.average.load_state_dict(state | {"shadow_params": [_part(whole, parameter) for whole, parameter in pairs]})
        self.average.to(self.device)  # checkpoints are read into the CPU's memory

    def _here(self) -> list[torch.nn.Parameter]:
        """The local parts of the weights, in the same memory."""
        return [
            torch.nn.Parameter(cast(DTensor, parameter.detach()).to_local()) if isinstance(parameter, DTensor) else parameter
            for parameter in self.parameters
        ]

    def _whole(self, average: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        if not isinstance(parameter, DTensor):
            return average
        sharded = DTensor.from_local(
            average,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        whole = sharded.full_tensor()
        return whole.cpu() if self.is_writer else whole.to("meta")


def _part(whole: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    # Every process has the whole tensor, so nothing is sent.
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
