"""A reference input and the model's output for it: stored with an export, and computed again by `verify`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qat_patch.linear.handle import get_linear_handle
from qat_patch.patch import require_handle

_TOKENS = 40
"""More than two groups of 16, and not a multiple of 16."""
_NUMBERS = 1 << 16
"""At most this many numbers of an output are stored, evenly spread over it."""
_UNQUANTIZED = "unquantized_output"
_EXACT = 1e-4
_ROUNDED = 0.1
"""How far (relative L2) an export may be from the exported model: in float32 on the same processor, and otherwise."""
_ORIGINAL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_ORIGINAL_TOLERANCE_LOW = 3e-2
"""How far (relative L2) original attention may be off on another processor or library, in bfloat16 and float16."""


def example_inputs(model: Any, host: str) -> dict[str, torch.Tensor] | None:
    """Inputs of a model's forward, made from its config, if it reads token ids or is a Wan transformer; else None."""
    generator = torch.Generator().manual_seed(0)
    if host == "transformers":
        return _token_ids(model, generator) if model.main_input_name == "input_ids" else None
    if type(model).__name__.removeprefix("FSDP") != "WanTransformer3DModel":
        return None
    config = model.config
    frames, height, width = (count * size for count, size in zip((2, 4, 5), config.patch_size, strict=True))
    inputs = {
        "hidden_states": torch.randn(1, config.in_channels, frames, height, width, generator=generator),
        "timestep": torch.tensor([500.0]),
        # 512: image to video assumes this number of text tokens.
        "encoder_hidden_states": torch.randn(1, 512, config.text_dim, generator=generator),
    }
    if config.image_dim is not None:
        # The first frame; Wan 2.1 FLF2V has positions for two images.
        images = 1 if config.pos_embed_seq_len is None else 2
        inputs["encoder_hidden_states_image"] = torch.randn(images, 257, config.image_dim, generator=generator)
    return inputs


def _token_ids(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    vocabulary = model.get_input_embeddings().weight.shape[0]  # also for a layer with adapters
    ids = torch.randint(vocabulary, (1, _TOKENS), generator=generator)
    config = model.config.to_dict()
    # Leave out ids of images, videos and sounds: they need the image, video or sound itself.
    media = {
        x for key, x in config.items() if isinstance(x, int) and re.match(r"(image|video|vision|audio|boi|eoi)_.*token", key)
    }
    if media:
        other = next(x for x in range(vocabulary) if x not in media)
        ids = torch.where(torch.isin(ids, torch.tensor(sorted(media))), other, ids)
    if not config.get("is_encoder_decoder"):
        return {"input_ids": ids}
    if isinstance(end := config.get("eos_token_id"), int):
        ids = torch.where(ids == end, (end + 1) % vocabulary, ids)
        ids[:, -1] = end  # classifiers look for it
    return {"input_ids": ids, "decoder_input_ids": ids.flip(1)}


def live_outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor], *, is_default: bool) -> dict[str, torch.Tensor]:
    """The outputs of the exported model for the reference input, with both kinds of attention.

    Raises:
        ValueError: an input is not a tensor, the model cannot run it, or the output is not finite.
    """
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"export_checkpoint: example_inputs: expected tensors by argument name, got {name}={value!r}")
    try:
        outputs = _outputs(model, inputs)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        whose = "made from its config; pass example_inputs=..." if is_default else "of example_inputs"
        raise ValueError(
            f"export_checkpoint: {type(model).__name__} cannot run the reference input {', '.join(inputs)}, {whose}: "
            f"{error or type(error).__name__}"
        ) from error
    _check_finite(outputs)
    return outputs


def write_reference(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], file: Path, live: dict[str, torch.Tensor] | None, *, is_exact: bool
) -> dict[str, Any]:
    """Run a model that was read back, with both kinds of attention, and store inputs and outputs in a folder.

    Args:
        model: the model as read back from the folder.
        inputs: tensors by argument name.
        file: where to.
        live: the exported model's own outputs; None: its weights are of another kind (quantized).
        is_exact: only the order of sums may differ: no narrow types, no other processor.

    Returns:
        How the outputs were computed, for the manifest.

    Raises:
        ValueError: the output is not finite, or differs from that of the exported model.
    """
    outputs = _outputs(model, inputs)
    _check_finite(outputs)
    if live is not None:
        _check_same(outputs, live, is_exact=is_exact)
    stored = {f"input.{name}": x.detach().cpu().contiguous() for name, x in inputs.items()}
    save_file(stored | outputs, file)
    dtype = str(dtype_of(model)).removeprefix("torch.")
    return {"device": _device(model).type, "dtype": dtype, "torch": torch.__version__}


def _check_finite(outputs: dict[str, torch.Tensor]) -> None:
    for name, x in outputs.items():
        if not x.isfinite().all():
            raise ValueError(
                f"export_checkpoint: the {name} of the model for a reference input is not finite; its weights are broken, or "
                "their type is too narrow for them"
            )


def _check_same(written: dict[str, torch.Tensor], live: dict[str, torch.Tensor], *, is_exact: bool) -> None:
    quantization = _distance(live["output"], live["original_output"])
    linear = _noise_of_linears(live)
    # Different rounding may give different 4-bit codes; then the outputs differ by quantization noise.
    limits = {
        "original_output": _EXACT if is_exact else _ROUNDED + 1.5 * linear,
        "output": max(_EXACT, quantization / 2) if is_exact else _ROUNDED + 1.5 * (quantization + linear),
    }
    for name, limit in limits.items():
        distance = _distance(written[name], live[name]) if written[name].shape == live[name].shape else float("inf")
        if not distance <= limit:
            raise ValueError(
                f"export_checkpoint: what would be written computes something else than the model does: for a reference input "
                f"the {name} differs by {distance:.2e} (relative L2), expected at most {limit:.2e}; nothing was written. The "
                "model holds something that is not part of its weights, attention or adapters, or its patch was replaced; "
                "print(get_handle(model)) shows the patch"
            )


def check_reference(model: torch.nn.Module, file: Path) -> dict[str, float]:
    """Run a loaded export on its stored input.

    Returns:
        Relative L2 distance to the stored outputs by name: `output`, `original_output`, and `unquantized_output` if linear layers
        are quantized too. 0 means bit-equal.

    Raises:
        ValueError: they differ by more than other processors and library versions explain.
    """
    stored = load_file(file)
    inputs = {name.removeprefix("input."): x for name, x in stored.items() if name.startswith("input.")}
    found = _outputs(model, inputs)
    for name in found:
        if name not in stored or stored[name].shape != found[name].shape:
            raise ValueError(f"verify: {file} has no {name} of shape {list(found[name].shape)}; it is damaged")
    distances = {name: _distance(found[name], stored[name]) for name in found}
    tolerance, linear = _ORIGINAL_TOLERANCE.get(dtype_of(model), _ORIGINAL_TOLERANCE_LOW), _noise_of_linears(stored)
    limits = {
        # Rounding noise flips single codes, which changes far less than quantization does.
        "output": max(_distance(stored["output"], stored["original_output"]), linear) / 2,
        "original_output": max(tolerance, linear / 2),
        _UNQUANTIZED: tolerance,
    }
    for name, distance in distances.items():
        # "not <" so that NaN fails too.
        if distance != 0 and not distance < limits[name]:
            raise ValueError(
                f"verify: {file.parent}: the {name} for the reference input differs from the recorded one by {distance:.2e} "
                f"(relative L2), expected less than {limits[name]:.2e}; weights, config or libraries are not those of the export"
            )
    return distances


@torch.no_grad()
def _outputs(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's outputs with 4-bit and with original attention: float32 [at most 65,536].

    Quantized linear layers are on in both; then there is a third output with them off.
    """
    was_training = model.training
    model.eval()
    device, dtype = _device(model), dtype_of(model)
    inputs = {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}
    handle = require_handle(model)
    output = _first(model(**inputs))
    outputs = {"output": output}
    with handle.disabled():
        outputs["original_output"] = _first(model(**inputs))
        if (linears := get_linear_handle(model)) is not None:
            with linears.disabled():
                outputs[_UNQUANTIZED] = _first(model(**inputs))
    model.train(was_training)
    return outputs


def _noise_of_linears(outputs: dict[str, torch.Tensor]) -> float:
    """How far quantized linear layers move a model's output; 0 if there are none."""
    return _distance(outputs["original_output"], outputs[_UNQUANTIZED]) if _UNQUANTIZED in outputs else 0.0


def _first(output: Any) -> torch.Tensor:
    numbers = output[0].flatten()
    return numbers[:: max(1, len(numbers) // _NUMBERS)].float().cpu().contiguous()


def dtype_of(model: torch.nn.Module) -> torch.dtype:
    """The type of a model's inputs."""
    return getattr(model, "dtype", None) or next(model.parameters()).dtype


def _device(model: torch.nn.Module) -> torch.device:
    """Where a model computes. Accelerate's hooks bring offloaded weights there for each call."""
    for module in model.modules():
        if (hook := getattr(module, "_hf_hook", None)) is not None and getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(model.parameters()).device


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return 0.0 if torch.equal(a, b) else ((a - b).double().norm() / b.double().norm()).item()
