"""A quantized linear layer: it rounds its weight and its input to NVFP4."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional

from .compressed import fake_quantize


@dataclasses.dataclass(eq=False, kw_only=True)
class LinearLayer:
    """The settings that a quantized layer reads at every call."""

    name: str
    """Its name in the model, without PEFT's additions."""
    weight_scale: float
    """The global scale of the weight."""
    input_scale: float | None = None
    """The global scale of the input; None before it is measured, and if inputs are not rounded."""
    rounds_inputs: bool
    """Whether inputs are rounded."""
    is_packed: bool = False
    """The weight comes from a packed export: it is already on the grid, and is not rounded again."""
    off: int = 0
    """How many open contexts need the unquantized layer."""
    is_measured: bool = False
    """Whether the largest input is being measured."""
    largest: torch.Tensor | None = None
    """The largest magnitude of an input so far."""

    def measure(self, x: torch.Tensor) -> None:
        """Update the largest magnitude with an input."""
        if x.numel():
            largest = x.detach().abs().amax().float()
            self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)

    def __getstate__(self) -> dict[str, Any]:
        if self.off:
            raise ValueError(
                f"{self.name}: expected to be copied or pickled while it is quantized, got it inside disabled() or "
                "calibration(), which the copy would never leave; copy the model outside"
            )
        return self.__dict__.copy()


class QuantizedLinear(torch.nn.Linear):
    """The class of a quantized layer: a `torch.nn.Linear` with the same parameters under the same names.

    Forward: F(x) F(W)^T + b, where F rounds to NVFP4 and back. Backward, with straight-through gradients: dx = dy F(W),
    dW = dy^T F(x), db = the sum of dy. Under autocast x is rounded to autocast's dtype first, as a server gets it.
    """

    quantization: LinearLayer

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        layer = self.quantization
        if layer.is_measured:
            layer.measure(input)
        return super().forward(input) if layer.off else self.quantized(input, self.weight)

    def quantized(self, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same with another weight, such as one with adapters added. It is always rounded."""
        layer = self.quantization
        if not layer.is_packed:
            weight = fake_quantize(weight, layer.weight_scale)
        elif weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{layer.name}: the weights of a packed export are on the 4-bit grid, and steps smaller than the grid would be "
                "lost: expected requires_grad=False; train the model that it was exported from, or adapters beside it"
            )
        if layer.rounds_inputs:
            if layer.input_scale is None:
                raise ValueError(
                    f"{layer.name}: the range of its input has not been measured: run a few batches of real data inside "
                    "`with get_linear_handle(model).calibration():`, or use LinearQATConfig(format='nvfp4a16')"
                )
            if torch.is_autocast_enabled(input.device.type):
                input = input.to(torch.get_autocast_dtype(input.device.type))
            input = fake_quantize(input, layer.input_scale)
        if not torch.is_autocast_enabled(input.device.type):
            weight = weight.to(self.weight.dtype)
        return functional.linear(input, weight, self.bias)
