"""Measurements before the first step: means of K and Q (`k_shift`, `q_shift`) and ranges of inputs. They apply from then on,
and are in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import Accelerator

from qat_patch import LinearHandle, PatchHandle, calibrate
from qat_patch.layer import SHIFTS, Shifts

from .objective import CalledWithBatch, Objective


class Calibration:
    """`handle.shifts` for Accelerate to save and load: they are not in the model's state_dict."""

    def __init__(
        self, handle: PatchHandle, accelerator: Accelerator, exclude: Sequence[str] = (), shifts: Sequence[str] = tuple(SHIFTS)
    ) -> None:
        """`exclude` and `shifts`: as for `calibrate`."""
        self.handle, self.device, self.exclude, self.shifts = handle, accelerator.device, exclude, shifts

    def measure(self, objective: Objective, model: torch.nn.Module, batches: Sequence[Any]) -> None:
        """Measure and apply the means over batches of every process. The random numbers of the training do not change."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            calibrate(CalledWithBatch(objective, model), batches, exclude=self.exclude, shifts=self.shifts)

    def state_dict(self) -> Shifts:
        return {which: found for which, found in self.handle.shifts.items() if found}

    def load_state_dict(self, state: Shifts) -> None:
        patched = self.handle.patched
        calibrated = {name for name in patched if not any(fnmatchcase(name, pattern) for pattern in self.exclude)}
        for which in SHIFTS:
            found, expected = state.get(which, {}), calibrated if which in self.shifts else set()
            is_right = found.keys() == expected
            if which == "k_shift" and "q_shift" in self.shifts:  # some modules can have a Q shift only
                is_right = found.keys() <= expected
            if not is_right or any(x.dim() != 2 or x.dtype != torch.float32 for x in found.values()):
                raise ValueError(f"expected {which} of every patched module that is calibrated, float32 [key heads, head_dim]")
            for name, shift in found.items():
                setattr(patched[name], which, shift)


class LinearCalibration:
    """The global scales of linear layers' inputs, for Accelerate to save and load."""

    def __init__(self, linears: LinearHandle, handle: PatchHandle, accelerator: Accelerator) -> None:
        self.linears, self.handle, self.device = linears, handle, accelerator.device

    def measure(self, objective: Objective, model: torch.nn.Module, batches: Sequence[Any]) -> None:
        """Measure and apply the scales for some batches of every process. The random numbers of the training do not change."""
        was_training = model.training
        model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), self.handle.disabled(), self.linears.calibration():
            for batch in batches:
                objective.outputs(model, objective.inputs(batch))
        model.train(was_training)

    def state_dict(self) -> dict[str, float]:
        layers = self.linears.layers
        return {name: layer.input_scale for name, layer in layers.items() if layer.input_scale is not None}

    def load_state_dict(self, state: dict[str, float]) -> None:
        layers = self.linears.layers
        if state.keys() != layers.keys() or not all(isinstance(x, float) and 0 < x < float("inf") for x in state.values()):
            raise ValueError("expected the global scale of the input of every quantized linear layer")
        for name, scale in state.items():
            layers[name].input_scale = scale
