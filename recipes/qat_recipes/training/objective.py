"""The objective of a step: the loss of the task, the distance to the unquantized model, or a mix of both."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, fsdp2_prepare_model
from torch.utils.data import DataLoader

from qat_patch import PatchHandle, get_linear_handle, unpatch_model, unquantize_linears
from qat_recipes.memory.empty_weights import find_by_name

from .adapters import has_adapters, without_adapters


class Objective(Protocol):
    """What is learned, split into methods so that two models can get the same inputs."""

    distance_name: str
    """The name of the distance to the teacher in the log."""

    def inputs(self, batch: Any) -> Any:
        """The model's inputs and targets. Every random number is drawn here."""

    def outputs(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """The model's outputs. `model` is the task's model as prepared by Accelerate, or the teacher."""

    def loss(self, outputs: torch.Tensor, inputs: Any) -> torch.Tensor:
        """The mean loss of a batch, a scalar."""

    def distance(self, outputs: torch.Tensor, teacher_outputs: torch.Tensor) -> torch.Tensor:
        """The distance of the outputs to the teacher's, a scalar: 0 if they are equal."""


class CalledWithBatch(torch.nn.Module):
    """A prepared model that can be called with a batch of the loader, which is what qat_patch's measurements need."""

    def __init__(self, objective: Objective, model: torch.nn.Module) -> None:
        super().__init__()
        self.objective, self.model = objective, model

    def forward(self, *items: Any, **named: Any) -> torch.Tensor:
        return self.objective.outputs(self.model, self.objective.inputs(named or list(items)))


Teacher = Callable[[torch.nn.Module, Any], torch.Tensor]
"""teacher(model, inputs) gives the outputs of the starting weights with original attention and linear layers, without gradients;
`model` is the student as prepared by Accelerate."""


def make_teacher(
    objective: Objective,
    model: torch.nn.Module,
    handle: PatchHandle,
    accelerator: Accelerator,
    another: torch.nn.Module | None = None,
) -> Teacher:
    """The teacher of a model, before it is trained or prepared.

    A model with adapters is its own teacher, with the adapters off, which needs no memory. Otherwise the teacher is `another`
    model in original attention, or a copy.
    """
    if has_adapters(model):

        def itself(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
            was_training = model.training
            model.eval()
            # This ends before the student's forward pass, which gradient checkpointing runs again later.
            with torch.no_grad(), handle.disabled(), _unquantized(model), without_adapters(model):
                outputs = objective.outputs(model, inputs)
            model.train(was_training)
            return outputs

        return itself

    if another is None:
        another = copy.deepcopy(model)
        unpatch_model(another)
        if get_linear_handle(another) is not None:
            unquantize_linears(another)
    frozen = another.requires_grad_(False).eval()
    # Not with `accelerator.prepare`, which would save it in every checkpoint.
    if accelerator.is_fsdp2:
        find_by_name(frozen)
        frozen = fsdp2_prepare_model(accelerator, frozen)
    else:
        frozen = frozen.to(accelerator.device)

    def copied(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        with torch.no_grad(), accelerator.autocast():
            return objective.outputs(frozen, inputs)

    return copied


def _unquantized(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, quantized linear layers of the model compute unquantized."""
    linears = get_linear_handle(model)
    return contextlib.nullcontext() if linears is None else linears.disabled()


def losses(
    objective: Objective, model: torch.nn.Module, batch: Any, teacher: Teacher | None, distillation: float
) -> dict[str, torch.Tensor]:
    """`loss`, which is minimized; with a teacher also its parts, `task_loss` and the distance by its name."""
    inputs = objective.inputs(batch)
    target = None if teacher is None else teacher(model, inputs)
    outputs = objective.outputs(model, inputs)
    loss = objective.loss(outputs, inputs)
    if target is None:
        return {"loss": loss}
    distance = objective.distance(outputs, target)
    mixed = distance if distillation == 1 else (1 - distillation) * loss + distillation * distance
    return {"loss": mixed, "task_loss": loss, objective.distance_name: distance}


@torch.no_grad()
def evaluate(
    objective: Objective,
    model: torch.nn.Module,
    handle: PatchHandle,
    loader: DataLoader,
    accelerator: Accelerator,
    *,
    teacher: Teacher | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Means over held-out data: `eval_loss_original` in original and `eval_loss_fp4` in 4-bit attention.

    Quantized linear layers are off in both of these; `eval_loss_linear` has only them on, and `eval_loss_fp4_linear` has all in 4
    bits, like the export. (Weights of a packed export are on the 4-bit grid in all
    four.)

    Also the distance between the first and the last, such as `eval_kl_between`: the effect of quantization. With a teacher also
    the distances to it, such as `eval_kl_original` and `eval_kl_fp4`. All get the same inputs, and the random numbers of the
    training do not change. With several processes the last batch is filled with samples from the start.
    """
    was_training = model.training
    model.eval()
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    samples: dict[str, list[torch.Tensor]] = {}
    off: dict[str, list[Callable[[], contextlib.AbstractContextManager[None]]]] = {"original": [handle.disabled], "fp4": []}
    if (linears := get_linear_handle(model)) is not None:
        off = {"original": [handle.disabled, linears.disabled], "fp4": [linears.disabled], "linear": [handle.disabled]}
        off["fp4_linear"] = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in loader:
            inputs = objective.inputs(batch)
            target = None if teacher is None else teacher(model, inputs)
            measured, outputs, original = {}, torch.empty(0), torch.empty(0)
            for name, switches in off.items():
                with contextlib.ExitStack() as stack:
                    for switch in switches:
                        stack.enter_context(switch())
                    outputs = objective.outputs(model, inputs)
                if name == "original":
                    original = outputs
                measured[f"eval_loss_{name}"] = objective.loss(outputs, inputs)
                if target is not None:
                    measured[f"eval_{objective.distance_name}_{name}"] = objective.distance(outputs, target)
            measured[f"eval_{objective.distance_name}_between"] = objective.distance(outputs, original)
            for key, value in measured.items():
                value = value.float().repeat(find_batch_size(batch))
                samples.setdefault(key, []).append(accelerator.gather_for_metrics(value))
    model.train(was_training)
    # The losses of both kinds first, then the distances.
    return {key: torch.cat(samples[key]).double().mean().item() for key in sorted(samples, key=lambda key: "loss" not in key)}
