"""A reference input and what an exported model makes of it: stored with an export, computed again by verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qat_patch.patch import require_handle

from .manifest import REFERENCE

_TOKENS = 40
"""More than two groups of 16, and no multiple of 16."""
_NUMBERS = 1 << 16
"""Of an output only so many numbers are stored, evenly spread over it."""
_ORIGINAL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_ORIGINAL_TOLERANCE_LOW = 3e-2
"""Relative L2 that another processor or library may differ by in original attention, in bfloat16 and float16."""


def example_inputs(model: Any, host: str) -> dict[str, torch.Tensor] | None:
    """Arguments of a model's forward, made from its config: of a causal language model or a Wan transformer, else None."""
    generator = torch.Generator().manual_seed(0)
    if host == "transformers":
        vocabulary = model.get_input_embeddings().weight.shape[0]  # that of a layer with adapters too
        return {"input_ids": torch.randint(vocabulary, (1, _TOKENS), generator=generator)}
    if type(model).__name__.removeprefix("FSDP") != "WanTransformer3DModel":
        return None
    config = model.config
    frames, height, width = (count * size for count, size in zip((2, 4, 5), config.patch_size, strict=True))
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, frames, height, width, generator=generator),
        "timestep": torch.tensor([500.0]),
        # 512 because image to video takes that number of text tokens for granted.
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim, generator=generator),
    }
    if config.image_dim is not None:
        inputs["encoder_hidden_states_image"] = torch.randn(1, 257, config.image_dim, generator=generator)
    return inputs


def write_reference(model: torch.nn.Module, inputs: dict[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Run a patched model with both kinds of attention and store input and outputs in a folder.

    Returns:
        How it was computed, for the manifest.

    Raises:
        ValueError: an input is no tensor, or the output is not finite.
    """
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"export_checkpoint: example_inputs: expected tensors by argument name, got {name}={value!r}")
    outputs = _outputs(model, inputs)
    for name, x in outputs.items():
        if not x.isfinite().all():
            raise ValueError(
                f"export_checkpoint: the {name} of the model for a reference input is not finite; its weights are broken, or "
                f"{x.dtype} is too narrow for them"
            )
    stored = {f"input.{name}": x.detach().cpu().contiguous() for name, x in inputs.items()}
    save_file(stored | outputs, folder / REFERENCE)
    parameter = next(model.parameters())
    dtype = str(_dtype(model)).removeprefix("torch.")
    return {"device": parameter.device.type, "dtype": dtype, "torch": torch.__version__}


def check_reference(model: torch.nn.Module, folder: Path) -> dict[str, float]:
    """Run a loaded export on its stored input.

    Returns:
        Relative L2 distance to the stored outputs by name, `output` and `original_output`; 0 where they are bit-equal.

    Raises:
        ValueError: they differ by more than other processors and library versions explain.
    """
    stored = load_file(folder / REFERENCE)
    inputs = {name.removeprefix("input."): x for name, x in stored.items() if name.startswith("input.")}
    found = _outputs(model, inputs)
    for name in ("output", "original_output"):
        if name not in stored or stored[name].shape != found[name].shape:
            raise ValueError(f"verify: {folder / REFERENCE} has no {name} of shape {list(found[name].shape)}; it is damaged")
    distances = {name: _distance(found[name], stored[name]) for name in found}
    limits = {
        # Rounding noise flips single codes: that stays far below what quantization itself changes.
        "output": _distance(stored["output"], stored["original_output"]) / 2,
        "original_output": _ORIGINAL_TOLERANCE.get(_dtype(model), _ORIGINAL_TOLERANCE_LOW),
    }
    for name, distance in distances.items():
        # Written so that NaN fails.
        if distance != 0 and not distance < limits[name]:
            raise ValueError(
                f"verify: {folder}: the {name} for the reference input differs from the recorded one by {distance:.2e} (relative "
                f"L2), expected less than {limits[name]:.2e}; weights, config or libraries are not those of the export"
            )
    return distances


@torch.no_grad()
def _outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model makes of the inputs, with 4-bit and with original attention: float32 [at most 65,536]."""
    was_training = model.training
    model.eval()
    device, dtype = next(model.parameters()).device, _dtype(model)
    inputs = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}
    handle = require_handle(model)
    output = _first(model(**inputs))
    with handle.disabled():
        original = _first(model(**inputs))
    model.train(was_training)
    return {"output": output, "original_output": original}


def _first(output: Any) -> torch.Tensor:
    numbers = output[0].flatten()
    return numbers[:: max(1, len(numbers) // _NUMBERS)].float().cpu().contiguous()


def _dtype(model: torch.nn.Module) -> torch.dtype:
    return getattr(model, "dtype", None) or next(model.parameters()).dtype


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return 0.0 if torch.equal(a, b) else ((a - b).double().norm() / b.double().norm()).item()
