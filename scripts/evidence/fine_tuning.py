"""What experiments that train a language model share: a step as the recipe makes it, and measurements window by window."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from transformers import get_scheduler, masking_utils

from qat_recipes.data.chat import IGNORED
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


WARM_UP = 3
"""Steps that run before a step is captured: they compile kernels, and make the states of the optimizer."""


def fine_tune(
    model: torch.nn.Module,
    settings: TrainingSettings,
    windows: torch.Tensor,
    *,
    teacher: Teacher | None,
    measure: Callable[[], dict[str, float]],
    attention: Attention = contextlib.nullcontext,
) -> dict[str, Any]:
    """Train a model in place. On a GPU a step is a CUDA graph: small models wait for Python otherwise.

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
    device, steps = windows.device, settings.steps
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(settings, model)
    rates, rate = learning_rates(settings).to(device), torch.zeros((), device=device)
    for group in optimizer.param_groups:
        group.update(lr=rate, capturable=device.type == "cuda")
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    order = torch.tensor(list(ShuffledBatches(len(windows), settings.batch_size, settings.seed, 0, steps))).to(device)
    ids = torch.empty_like(windows[: settings.batch_size])

    def step() -> torch.Tensor:
        with attention(), whole_windows():
            with autocast(settings, device):
                loss = losses(OBJECTIVE, model, {"input_ids": ids}, teacher, settings.distillation)["loss"]
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack([loss.detach(), norm])

    make_step = Captured(step) if device.type == "cuda" else step
    # Stays on the device: nothing waits for the numbers.
    curve, record = [{"step": 0} | measure()], torch.empty(steps, 2, device=device)
    for number in range(1, steps + 1):
        model.train()
        torch.index_select(windows, 0, order[number - 1], out=ids)
        rate.copy_(rates[number - 1])
        record[number - 1] = make_step()
        if settings.is_due(settings.eval_every, number):
            curve.append({"step": number} | measure())
    return {"curve": curve, "loss": rounded(record[:, 0]), "grad_norm": rounded(record[:, 1])}


def learning_rates(settings: TrainingSettings) -> torch.Tensor:
    """Of every step, float32 [steps]."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
    scheduler, found = get_scheduler(schedule, optimizer, settings.warmup_steps, settings.steps), []
    for _ in range(settings.steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return torch.tensor(found)


@contextlib.contextmanager
def whole_windows() -> Iterator[None]:
    """Inside, Transformers takes a row for one text without padding, as every window is. Otherwise it looks at the positions on
    the host, and where it may not, while a CUDA graph is captured, it masks as if there were several texts in a row."""
    with mock.patch.multiple(masking_utils, **_ONE_TEXT):
        yield


# The same functions every time, or blocks would be compiled again.
_ONE_TEXT: dict[str, Any] = {"find_packed_sequence_indices": lambda *_: None, "is_tracing": lambda *_: False}


class Captured:
    """A function without arguments, called a few times and then replayed as a CUDA graph. What it returns is overwritten by the
    next call."""

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        self.function, self.graph, self.left = function, torch.cuda.CUDAGraph(), WARM_UP
        self.side = torch.cuda.Stream()

    def __call__(self) -> torch.Tensor:
        if self.left:
            self.left -= 1
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.result = self.function()
            torch.cuda.current_stream().wait_stream(self.side)
            if not self.left:
                with torch.cuda.graph(self.graph):
                    self.replayed = self.function()
            return self.result
        self.graph.replay()
        return self.replayed


@torch.no_grad()
def measure_windows(
    model: torch.nn.Module,
    attentions: dict[str, Attention],
    windows: torch.Tensor,
    teacher: Teacher,
    settings: TrainingSettings,
    at_once: int,
) -> Windows:
    """Held-out losses and distances in several attentions, for each window; so many windows `at_once` are computed.

    Returns:
        For each of `attentions`, by name: `loss_NAME`, nats per token, and `kl_NAME`, KL(starting model in original attention ||
        model in this attention); and for each but the first, `between_NAME`, KL(model in the first || model in this one).
    """
    model.eval()
    found: Windows = {}

    def add(name: str, values: torch.Tensor) -> None:
        found.setdefault(name, []).extend(values.tolist())

    for ids in windows.split(at_once):
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


def rounded(values: torch.Tensor) -> list[float]:
    """Numbers of five digits."""
    return [float(f"{value:.5g}") for value in values.tolist()]


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every token but the first, [batch, length - 1]."""
    # The logits of the last token have no target. They are left out behind, as without them the others would be copied.
    targets = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    found = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return found.view_as(ids)[:, :-1]


def divergences(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean KL(target || logits) over the tokens of each window, [batch]. Window by window, for memory."""
    return torch.stack([OBJECTIVE.distance(ours[None], theirs[None]) for ours, theirs in zip(logits, target, strict=True)])
