"""Frozen weights under adapters in 8 or 4 bits: those of the linear layers in repeated blocks, which are most of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState


def repeated_blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated blocks, by the class names that the host library gives; empty if it gives none."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in model.modules() if type(module).__name__ in names]


def hold_in_float8(model: torch.nn.Module) -> None:
    """Store the linear layers of the blocks in float8 (e4m3) with Diffusers' layerwise casting; adapters do not change.

    While a layer computes, it has its weights in their original dtype, and the backward pass keeps those of the forward pass:
    with gradient checkpointing only those of one block.

    Raises:
        ValueError: Diffusers is not installed, or the host library does not say which blocks repeat.
    """
    try:
        from diffusers.hooks import apply_layerwise_casting
    except ImportError as error:
        raise ValueError("lora.base_dtype: float8 needs diffusers; pip install it, or choose another") from error
    for block in _blocks(model, "float8"):
        own = next(layer.weight.dtype for layer in block.modules() if type(layer) is torch.nn.Linear)
        apply_layerwise_casting(block, torch.float8_e4m3fn, own, skip_modules_pattern=("norm", "lora_"))


def hold_in_nf4(model: torch.nn.Module) -> None:
    """Quantize the linear layers of the blocks to NF4 with bitsandbytes, before adapters are added.

    Each layer on the device of this process, where it stays: 14 billion weights take a CPU minutes, and a GPU never holds more
    than one layer as it was.

    Raises:
        ValueError: bitsandbytes is not installed, or the host library does not say which blocks repeat.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError("lora.base_dtype: nf4 needs bitsandbytes; pip install 'qat-patch[low-memory]'") from error
    device = PartialState().device
    for block in _blocks(model, "nf4"):
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if type(layer) is torch.nn.Linear:
                    setattr(parent, name, _nf4(bitsandbytes.nn, layer, device))


@contextlib.contextmanager
def known_to_peft(model: torch.nn.Module) -> Iterator[None]:
    """Inside, PEFT uses its adapters for 4-bit layers on the layers of `hold_in_nf4`."""
    marked: Any = model
    marked.is_loaded_in_4bit = True
    try:
        yield
    finally:
        del marked.is_loaded_in_4bit


def _nf4(library: Any, layer: torch.nn.Linear, device: torch.device) -> torch.nn.Module:
    quantized = library.Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=layer.weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    # bitsandbytes quantizes when weights are moved.
    quantized.weight = library.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=quantized)
    quantized.bias = layer.bias
    # On some CPUs it would pack weights for inference in evaluation mode, in a form that training cannot read.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.to(device)


def _blocks(model: torch.nn.Module, dtype: str) -> list[torch.nn.Module]:
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(f"lora.base_dtype: {type(model).__name__} has no blocks that are known to repeat; got {dtype}")
    return blocks
