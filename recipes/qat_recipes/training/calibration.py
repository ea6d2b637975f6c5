"""The mean keys of a run (`k_shift`): measured before the first step, in force ever after, and part of every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import Accelerator

from qat_patch import PatchHandle, calibrate

from .objective import CalledWithBatch, Objective


class Calibration:
    """`handle.k_shift` as Accelerate saves and loads it: it is no part of the model's state_dict."""

    def __init__(self, handle: PatchHandle, accelerator: Accelerator, exclude: Sequence[str] = ()) -> None:
        """`exclude`: patterns of modules that get no shift, as for `calibrate`."""
        self.handle, self.device, self.exclude = handle, accelerator.device, exclude

    def measure(self, objective: Objective, model: torch.nn.Module, batches: Sequence[Any]) -> None:
        """Put the mean keys over some batches of every process into force; random numbers of the training are left alone."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            calibrate(CalledWithBatch(objective, model), batches, exclude=self.exclude)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.handle.k_shift

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        patched = self.handle.patched
        expected = {name for name in patched if not any(fnmatchcase(name, pattern) for pattern in self.exclude)}
        if state.keys() != expected or any(x.dim() != 2 or x.dtype != torch.float32 for x in state.values()):
            raise ValueError("expected the mean keys of every patched module that is calibrated, float32 [key heads, head_dim]")
        for name, shift in state.items():
            patched[name].k_shift = shift
