"""One optimizer step: gradients are averaged over batches and processes and clipped; weights change only if all are finite."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Any

import torch
from accelerate import Accelerator

from ..memory.activations import activations_on_cpu
from .diagnostics import gradient_norms
from .objective import Teacher, losses
from .settings import TrainingSettings
from .task import Task


@dataclasses.dataclass(kw_only=True)
class Stepper:
    """Makes the steps of a run."""

    settings: TrainingSettings
    """Of the run."""
    task: Task
    """What is learned."""
    accelerator: Accelerator
    """Prepared what follows."""
    model: torch.nn.Module
    """The task's model as prepared by Accelerate."""
    optimizer: torch.optim.Optimizer
    """Moves its weights."""
    teacher: Teacher | None
    """For distillation."""

    def step(self, batches: list[Any], *, is_detailed: bool) -> dict[str, float]:
        """Make a step. Returns losses, averaged over batches and processes, the gradient norm before clipping, and tokens.

        With details also the gradient norms of the layers.

        The weights do not change if any value is not finite; all processes agree on this.
        """
        settings, task, accelerator = self.settings, self.task, self.accelerator
        group = settings.processes_a_sample
        sums: dict[str, torch.Tensor] = {}
        limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
        # Also around the backward pass, in which gradient checkpointing runs the forward pass again.
        with contextlib.nullcontext() if settings.attention == "fp4" else task.handle.disabled():
            for batch in batches:
                with accelerator.accumulate(self.model):
                    with activations_on_cpu() if settings.offload_activations else contextlib.nullcontext():
                        values = losses(task.objective, self.model, batch, self.teacher, settings.distillation)
                    # Gradients are averaged over processes, but those of a group are parts that must be summed.
                    accelerator.backward(values["loss"] * group)
                values["tokens"] = torch.tensor(task.tokens(batch))
                for name, value in values.items():
                    value = value.detach().to(accelerator.device, torch.float32)
                    sums[name] = sums[name] + value if name in sums else value
        layers = gradient_norms(self.model) if is_detailed else {}
        norm = accelerator.clip_grad_norm_(self.model.parameters(), limit)
        totals = dict(zip(sums, accelerator.reduce(torch.stack(list(sums.values())), "sum").tolist(), strict=True))
        tokens = int(totals.pop("tokens")) // group
        batches_a_step = settings.accumulation_steps * accelerator.num_processes
        means = {name: total / batches_a_step for name, total in totals.items()}
        if part := task.part(batches[0]):
            layers[f"loss/{part}"] = means["loss"]
        measured: dict[str, float] = {**means, "grad_norm": float(norm), "tokens": tokens, **layers}
        if is_finite(measured):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return measured


def is_finite(measured: dict[str, float]) -> bool:
    """Whether a step changed the weights."""
    return math.isfinite(measured["loss"]) and math.isfinite(measured["grad_norm"])
