"""Log entries about layers and speed: gradient norms, quantization errors, and operations per second against the GPU's peak."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.flop_counter import FlopCounterMode

from qat_patch import PatchHandle, sensitivity

from .adapters import has_adapters
from .objective import CalledWithBatch, Objective

PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "GB200": 2500,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "RTX 5090": 209,
    "RTX 4090": 165,
}
"""The vendor's dense bfloat16 peak, by a part of the device's name; the first match counts."""

_FUSED_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
    torch.ops.aten._scaled_dot_product_efficient_attention,
    torch.ops.aten._scaled_dot_product_cudnn_attention,
)


def _attention_operations(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """The operations of both products, from the shapes [B, H, Lq, D], [B, Hk, Lk, D] and [B, Hk, Lk, Dv].

    In torch 2.11 the counter's own formula refuses fewer key heads than query heads, and ignores the CPU's kernel.
    """
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def gradient_norms(model: torch.nn.Module) -> dict[str, float]:
    """The L2 norm of the gradients of each numbered block, such as `grad_norm/model.layers.7`, and of the rest."""
    blocks: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
            block = "rest" if number is None else ".".join(parts[: number + 1]).removeprefix("module.")
            blocks.setdefault(block, []).append(parameter.grad)
    norms = {f"grad_norm/{name}": torch.nn.utils.get_total_norm(gradients) for name, gradients in blocks.items()}
    # Sharded gradients give a sharded norm.
    return {name: getattr(x, "full_tensor", lambda x=x: x)().item() for name, x in norms.items()}


def quantization_errors(
    objective: Objective, model: torch.nn.Module, handle: PatchHandle, batches: list[Any], device: torch.device
) -> dict[str, float]:
    """Relative L2 error of 4-bit attention in each patched module on batches, such as `quantization_error/blocks.3.attn1`.

    Each module gets the inputs of original attention, so errors of one module do not reach the next. Only of this process.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        report = sensitivity(CalledWithBatch(objective, model), batches)
    # By their names in the task's model, without the wrappers around it.
    return {f"quantization_error/{name}": layer.error for name, layer in zip(handle.patched, report.layers, strict=True)}


class FlopCount:
    """Floating-point operations of a training batch: three times those of a forward pass with original attention.

    Twice if only adapters are trained, because the gradients of frozen weights are not computed. Recomputation by gradient
    checkpointing does not count. Each shape of batch is counted only once.

    A forward pass of a sharded model needs all processes: they count together whenever one of them has a new shape.
    """

    def __init__(self, objective: Objective, handle: PatchHandle, model: torch.nn.Module, accelerator: Accelerator) -> None:
        self.objective, self.handle, self.accelerator = objective, handle, accelerator
        self.device = device = accelerator.device
        self.passes = 2 if has_adapters(model) else 3
        self.known: dict[Any, int] = {}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)

    def of(self, model: torch.nn.Module, batch: Any) -> int:
        """Operations for one batch."""
        tensors = batch.values() if isinstance(batch, dict) else batch
        shapes = tuple(tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor))
        is_new = shapes not in self.known
        if self.accelerator.is_fsdp2:
            is_new = bool(self.accelerator.reduce(torch.tensor(float(is_new), device=self.device), "sum"))
        if is_new:
            devices = [self.device] if self.device.type == "cuda" else []
            # The random numbers of the training do not change. Compiled blocks would hide their operations.
            eager = torch.compiler.set_stance("force_eager")
            counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(_FUSED_ATTENTION, _attention_operations))
            with torch.random.fork_rng(devices), torch.no_grad(), self.handle.disabled(), eager, counter:
                self.objective.outputs(model, self.objective.inputs(batch))
            self.known[shapes] = self.passes * counter.get_total_flops()
        return self.known[shapes]

    def speed(self, operations: int, seconds: float) -> dict[str, float]:
        """`tflops_per_second` of this process, and `mfu`, its fraction of the GPU's peak, if that is known."""
        speed = operations / seconds / 1e12
        return {"tflops_per_second": speed} | ({} if self.peak is None else {"mfu": speed / self.peak})
