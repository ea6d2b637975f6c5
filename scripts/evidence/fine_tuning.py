"""What experiments that train a language model share: a step as the recipe makes it, and measurements window by window."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.nn import functional
from transformers import get_scheduler

from qat_recipes.data.text import ShuffledBatches
from qat_recipes.tasks.language_modeling import NextToken
from qat_recipes.training.objective import Teacher, losses
from qat_recipes.training.optimization import make_optimizer
from qat_recipes.training.settings import TrainingSettings

Attention = Callable[[], AbstractContextManager[Any]]
"""Puts an attention into force, such as `handle.disabled`."""
Windows = dict[str, list[float]]
"""Means over the tokens of each held-out window, by what was measured."""


class NextTokenOfWindows(NextToken):
    """The recipe's objective on whole windows of one text: nothing is packed, so no mask and no `cu_seqlens` are needed."""

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def loss(self, outputs: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return token_losses(outputs, inputs["input_ids"]).mean()


OBJECTIVE = NextTokenOfWindows()


def autocast(settings: TrainingSettings, device: torch.device) -> AbstractContextManager[Any]:
    """Mixed precision as the settings say."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=settings.mixed_precision == "bf16")


def frozen_teacher(start: torch.nn.Module) -> Teacher:
    """The starting model in its original attention."""

    def teacher(model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return OBJECTIVE.outputs(start, inputs)

    return teacher


def fine_tune(
    model: torch.nn.Module,
    settings: TrainingSettings,
    windows: torch.Tensor,
    *,
    teacher: Teacher | None,
    measure: Callable[[], dict[str, float]],
    attention: Attention = contextlib.nullcontext,
) -> dict[str, Any]:
    """Train a model in place.

    Args:
        model: what requires a gradient is trained.
        settings: of the training; which samples come when follows from the seed alone.
        windows: token ids to train on, int64 [windows, length], on the device of the model.
        teacher: for distillation.
        measure: called before the first step, every `eval_every` steps and after the last.
        attention: in force in forward and backward passes.

    Returns:
        `curve`, what `measure` gave, with the step; `loss`, the training loss, and `grad_norm`, before clipping, of every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(settings, model)
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    scheduler = get_scheduler(schedule, optimizer, settings.warmup_steps, settings.steps)
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    curve, train_losses, norms = [{"step": 0} | measure()], [], []
    batches = ShuffledBatches(len(windows), settings.batch_size, settings.seed, 0, settings.steps)
    for step, indices in enumerate(batches, 1):
        model.train()
        with attention():
            with autocast(settings, windows.device):
                values = losses(OBJECTIVE, model, {"input_ids": windows[indices]}, teacher, settings.distillation)
            values["loss"].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, limit))
        # Stays on the device: nothing waits for the numbers.
        train_losses.append(values["loss"].detach())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if settings.is_due(settings.eval_every, step):
            curve.append({"step": step} | measure())
    return {"curve": curve, "loss": rounded(train_losses), "grad_norm": rounded(norms)}


@torch.no_grad()
def measure_windows(
    model: torch.nn.Module,
    attentions: dict[str, Attention],
    windows: torch.Tensor,
    teacher: Teacher,
    settings: TrainingSettings,
) -> Windows:
    """Held-out losses and distances in several attentions, for each window.

    Returns:
        For each of `attentions`, by name: `loss_NAME`, nats per token, and `kl_NAME`, KL(starting model in original attention ||
        model in this attention); and for each but the first, `between_NAME`, KL(model in the first || model in this one).
    """
    model.eval()
    found: Windows = {}

    def add(name: str, values: torch.Tensor) -> None:
        found.setdefault(name, []).extend(values.tolist())

    for ids in windows.split(settings.batch_size):
        inputs, first = {"input_ids": ids}, None
        with autocast(settings, ids.device):
            target = teacher(model, inputs)
        for name, attention in attentions.items():
            with attention(), autocast(settings, ids.device):
                outputs = OBJECTIVE.outputs(model, inputs)
            add(f"loss_{name}", token_losses(outputs, ids).mean(1))
            add(f"kl_{name}", divergences(outputs, target))
            if first is None:
                first = outputs
            else:
                add(f"between_{name}", divergences(outputs, first))
    return {name: [round(value, 6) for value in values] for name, values in found.items()}


def means(windows: Windows) -> dict[str, float]:
    """Over all windows, which are equally long."""
    return {name: round(sum(values) / len(values), 6) for name, values in windows.items()}


def rounded(values: list[torch.Tensor]) -> list[float]:
    """Scalars on any device as numbers of five digits."""
    return [float(f"{value:.5g}") for value in torch.stack(values).float().tolist()]


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token but the first, [batch, length - 1]."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(
        ids.shape[0], -1
    )


def divergences(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean KL(target || logits) over the tokens of each window, [batch]. Window by window, for memory."""
    return torch.stack([OBJECTIVE.distance(ours[None], theirs[None]) for ours, theirs in zip(logits, target, strict=True)])
