"""The weights of a model as an export stores them: ordinary tensors, each in its dtype."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qat_patch.metadata import METHOD

from .manifest import weight_files

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The names that safetensors uses."""
_NARROW = (torch.float16, torch.bfloat16)


def as_dtype(dtype: torch.dtype | str | None, caller: str) -> torch.dtype | None:
    """A floating-point dtype, given as itself or by name.

    Raises:
        ValueError: it is not a known floating-point dtype.
    """
    known = {str(x).removeprefix("torch."): x for x in FLOATS.values()}
    found = known.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in known.values():
        raise ValueError(f"{caller}: dtype: expected one of {', '.join(known)}, got {dtype!r}")
    return found


def quantized_by_others(model: torch.nn.Module) -> str | None:
    """Why the weights of a model are not ordinary tensors, or None: what quantized them, or the first unusual tensor."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and (method := quantizer.quantization_config.quant_method) != METHOD:
        return f"quantized by {getattr(method, 'value', method)}"
    for name, parameter in model.named_parameters():
        # 4-bit and 8-bit weights are subclasses (GGUF, bitsandbytes, torchao, quanto) or have such a dtype. DTensor: sharded.
        if type(parameter).__name__ not in ("Parameter", "DTensor") or parameter.dtype not in FLOATS.values():
            return f"quantized: {name} is a {type(parameter).__name__} of {parameter.dtype}"
    return None


def offloaded_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights that Accelerate keeps on disk or elsewhere, by name; the model has them only during a call."""
    found: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            if (weights := getattr(each, "weights_map", None)) is not None:
                names = [name for name, x in module.named_parameters(recurse=each.place_submodules) if x.is_meta]
                found |= {f"{prefix}.{name}".removeprefix("."): weights[name] for name in names}
    return found


def exported_dtype(model: Any, name: str, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a tensor is stored if its model is cast to `dtype`: the host library keeps some in float32."""
    return own if dtype is None or not own.is_floating_point or _is_kept(model, name, dtype) else dtype


def _is_kept(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Decided as Diffusers and Transformers do when they load: by parts of names, and by patterns."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    strict = getattr(model, "_keep_in_fp32_modules_strict", None)
    if strict is None:
        return any(part in name.split(".") for part in kept)
    patterns = {*(strict if dtype in _NARROW else ()), *(kept if dtype == torch.float16 else ())}
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the weights in a folder, apart from those that the model may keep in float32."""
    types: set[torch.dtype] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            types |= {FLOATS.get(weights.get_slice(name).get_dtype(), torch.float32) for name in set(weights.keys())}
    narrow = types - {torch.float32}
    return narrow.pop() if len(narrow) == 1 else torch.float32


@torch.no_grad()
def set_stored_types(folder: Path, model: torch.nn.Module) -> None:
    """Give each weight its dtype in the file: host libraries load almost all weights in one dtype."""
    state = model.state_dict()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in state.keys() & set(weights.keys()):
                if FLOATS.get(weights.get_slice(name).get_dtype(), state[name].dtype) != state[name].dtype:
                    owner, _, last = name.rpartition(".")
                    # A weight that loading narrowed is read from the file again.
                    getattr(model.get_submodule(owner), last).data = weights.get_tensor(name)
