"""AdamW by its name in the settings: PyTorch's, or one of bitsandbytes with small states, or states that can leave the GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
_OF_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}
# The keys of bitsandbytes' states. Small parameters have float32 moments, without the other keys.
_WRAPPED = "__bnb_optimizer_quant_state__"
_MOMENTS, _BYTES = frozenset({"state1", "state2"}), frozenset({"qmap1", "qmap2", "absmax1", "absmax2"})


def check_optimizer(name: OptimizerName, device: torch.device, *, is_sharded: bool) -> None:
    """Raise a ValueError if this optimizer is not known to work here."""
    if name == "adamw":
        return
    if is_sharded:
        raise ValueError(f"settings.optimizer: expected adamw where weights are sharded over processes, got {name}")
    if name.startswith("paged") and device.type != "cuda":
        raise ValueError(
            f"settings.optimizer: {name} moves states out of the memory of a GPU, and this machine has none; use adamw_8bit"
        )


def make_adamw(
    name: OptimizerName,
    parameters: Iterable[torch.nn.Parameter],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW over parameters.

    Raises:
        ValueError: bitsandbytes is needed and not installed.
    """
    options: dict[str, Any] = {"lr": learning_rate, "betas": betas, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=fused)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(f"settings.optimizer: {name} needs bitsandbytes; pip install 'qat-patch[low-memory]'") from error
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, _OF_BITSANDBYTES[name])(parameters, **options)
    return optimizer


def check_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Raise a ValueError if a state_dict does not belong to such an optimizer with these parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    is_torch = isinstance(getattr(optimizer, "optimizer", optimizer), torch.optim.AdamW)
    for index, values in state["state"].items():
        shape = parameters[index].shape
        if is_torch:
            is_right = {*values} == {"step", "exp_avg", "exp_avg_sq"} and all(x.shape in (shape, ()) for x in values.values())
        else:
            inner = values.get(_WRAPPED)
            is_right = {*values} == {"step", _WRAPPED} and isinstance(values["step"], int) and isinstance(inner, dict)
            is_right = is_right and {*inner} in (_MOMENTS, _MOMENTS | _BYTES)
            is_right = is_right and all(isinstance(x, torch.Tensor) for x in inner.values())
            is_right = is_right and all(inner[name].shape == shape for name in _MOMENTS)
        if not is_right:
            raise ValueError(f"expected a step and two moments of shape {tuple(shape)} for parameter {index}")
