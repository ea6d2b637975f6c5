"""The mean keys of a run (`k_shift`): measured before the first step, in force ever after, and part of every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from qat_patch import PatchHandle, calibrate

from .objective import CalledWithBatch, Objective


class Calibration:
    """`handle.k_shift` as Accelerate saves and loads it: it is no part of the model's state_dict."""

    def __init__(self, handle: PatchHandle, accelerator: Accelerator) -> None:
        self.handle, self.device = handle, accelerator.device
        accelerator.register_for_checkpointing(self)

    def measure(self, objective: Objective, model: torch.nn.Module, batches: Sequence[Any]) -> None:
        """Put the mean keys over some batches of every process into force; random numbers of the training are left alone."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            calibrate(CalledWithBatch(objective, model), batches)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.handle.k_shift

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for name, layer in self.handle.patched.items():
            layer.k_shift = state[name]
