"""Measurements before the first step: mean keys (`k_shift`) and ranges of inputs. They apply from then on, and are in
checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from accelerate import Accelerator

from qat_patch import LinearHandle, PatchHandle, calibrate

from .objective import CalledWithBatch, Objective


class Calibration:
    """`handle.k_shift` for Accelerate to save and load: it is not in the model's state_dict."""

    def __init__(self, handle: PatchHandle, accelerator: Accelerator, exclude: Sequence[str] = ()) -> None:
        """`exclude`: patterns of modules that get no shift, as for `calibrate`."""
        self.handle, self.device, self.exclude = handle, accelerator.device, exclude

    def measure(self, objective: Objective, model: torch.nn.Module, batches: Sequence[Any]) -> None:
        """Measure and apply the mean keys over batches of every process. The random numbers of the training do not change."""
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
