"""What the training loop needs of a task: its model, its data, its objective and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, Sampler

from qat_patch import PatchHandle

from .objective import Objective


class Task(Protocol):
    """The interface that the loop needs."""

    model: torch.nn.Module
    """The patched model. Its trained parameters are float32."""
    handle: PatchHandle
    """The patch of the model."""
    objective: Objective
    """What it learns."""
    train_data: Dataset
    """Samples by index; torch's default collation makes batches."""
    eval_data: dict[str, Dataset]
    """Held-out samples, if eval_every is set, by the part of the model that they measure; "" if it has only one."""
    eval_batch_size: int
    """How many held-out samples fit into a batch."""
    places_itself: bool = False
    """Whether the model is already in place, so that Accelerate must not move it: a part of it stays in CPU memory."""

    def batches(self, start: int, stop: int) -> Sampler[Any]:
        """Batches of indices of train_data, from batch number `start` of the run to `stop`. They depend only on the seed.

        Raises:
            ValueError: there are too few samples.
        """

    def data_state(self, batches: int) -> dict[str, Any] | None:
        """The state of the data, besides the seed, to resume after this many batches: plain values, or None."""
        return None

    def restore_data(self, state: dict[str, Any]) -> None:
        """Restore a state of `data_state`. Called before the first batch of a resumed run, if there is one."""
        raise RuntimeError(f"{type(self).__name__}: expected no state of the data, since data_state gives none, got {state}")

    def fingerprints(self) -> dict[str, str]:
        """Digests of the run's inputs besides its settings, by description. A resumed run needs the same.

        Only the main process calls this, once, before the first step.
        """
        return {}

    def teacher(self) -> torch.nn.Module | None:
        """The model before the first step in original attention, if a copy of `model` would not do; called before anything is
        prepared."""
        return None

    def tokens(self, batch: Any) -> int:
        """Number of tokens in a batch."""

    def part(self, batch: Any) -> str:
        """The part of the model that a batch trains, for the log; "" if there is only one."""
        return ""

    def for_every_part(self, batches: list[Any]) -> list[Any]:
        """Batches that reach the whole model: if each trains only a part, the same number for every part."""
        return batches

    def after_step(self, step: int) -> dict[str, float]:
        """Called by all processes after every step, and with 0 before the first. The result goes into the log.

        It must not change the model or random generators.
        """

    def export(
        self, folder: Path, training: dict[str, Any], metrics: dict[str, float], weights: dict[str, torch.Tensor] | None
    ) -> None:
        """Write the trained model and the facts about the run. Only the main process calls this.

        `weights` is the whole state_dict if the model is sharded over processes, else None.
        """
