"""LoRA whose sum with the weight is rounded, as in an export of merged weights. Imported only if peft is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners import lora

from .module import QuantizedLinear


class MergedLora(lora.Linear):
    """The class of a PEFT layer around a quantized layer: F(x) F(W + s B A)^T + b.

    Gradients go straight through both roundings, and on to A and B. If the quantized layer or the adapters are switched off, it
    is PEFT's own layer.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        base: QuantizedLinear = self.get_base_layer()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if base.quantization.off or self.disable_adapters or self.merged or not names:
            return super().forward(x, *args, **kwargs)
        if args or kwargs:
            raise ValueError(
                f"{base.quantization.name}: expected one set of adapters for all samples, whose sum with the weight is "
                f"rounded, got {', '.join(kwargs) or 'more arguments'}; call quantize_linears(model, merge_adapters=False)"
            )
        weight = base.weight
        # In float32, like the sum in an export.
        with torch.autocast(x.device.type, enabled=False):
            for name in names:
                weight = weight.float() + self.get_delta_weight(name).float()
        return base.quantized(x, weight)


def problem(wrapper: Any) -> str | None:
    """Why the sum of a layer's weight and its adapters cannot be rounded, or None. Only plain LoRA is allowed."""
    if type(wrapper) is not lora.Linear or getattr(wrapper, "lora_variant", None):
        return f"a {type(wrapper).__name__}{' with a variant' if getattr(wrapper, 'lora_variant', None) else ''}"
    if any(not isinstance(dropout, torch.nn.Identity) for dropout in wrapper.lora_dropout.values()):
        return "LoRA with dropout, which merged weights cannot have"
    if any(wrapper.lora_bias.values()):
        return "LoRA with a bias"
    return None


def merge(wrappers: Iterable[Any]) -> None:
    """Make layers round the sum of their weight and adapters."""
    for wrapper in wrappers:
        wrapper.__class__ = MergedLora


def undo(wrappers: Iterable[Any]) -> None:
    """Make them PEFT's own layers again."""
    for wrapper in wrappers:
        wrapper.__class__ = lora.Linear
