"""Read common LoRA files, with the names of PEFT, Diffusers, ComfyUI and others: what they add to which weights."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from qat_patch.checkpoint.adapters import LORA_FILE, diffusers_name

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PEFT_PREFIX, _DIFFUSERS_PREFIX, _COMFY_PREFIX, _KOHYA_PREFIX = (
    "base_model.model.",
    "transformer.",
    "diffusion_model.",
    "lora_unet_",
)
_HEADER = "lora_adapter_metadata"
"""The header key in which Diffusers keeps PEFT's config."""
_ENDINGS = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora_A.default.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora_B.default.weight": "up",
    "alpha": "alpha",
    "lora_B.bias": "bias",
    "diff": "weight",
    "diff_b": "bias",
}
# Keys of PEFT's config: those that give the strength of adapters, and those that do not affect the weights.
_STRENGTH = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
_WITHOUT_EFFECT = {"target_modules", "exclude_modules", "lora_dropout", "inference_mode", "task_type", "auto_mapping", "revision"}
_WITHOUT_EFFECT |= {"base_model_name_or_path", "peft_version", "lora_bias", "layers_to_transform", "layers_pattern"}


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The change of a layer's weight: scale * up @ down."""

    down: torch.Tensor
    """[rank, inputs]"""
    up: torch.Tensor
    """[outputs, rank]"""
    scale: float


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """The changes that a LoRA file makes to a model."""

    layers: dict[str, LowRank]
    """By the layer's name in the model."""
    differences: dict[str, torch.Tensor]
    """By the parameter's name, such as a bias or the weight of a norm: the tensor to add to it. None is all zeros."""


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file, or the one in a folder.

    Names may be those of PEFT, of Diffusers, of ComfyUI and Wan's own code (`diffusion_model.` or no prefix) and of kohya's
    trainers (`lora_unet_`); strengths are read as these programs do: from the config of PEFT, from `alpha` beside the matrices,
    or else 1.

    Raises:
        ValueError: the file does not exist, or something in it is not known to be LoRA.
    """
    file = _find(path)
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            header = stored.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"lora.start.path: {file} cannot be read: {error}") from error
    parts = _by_layer(file, tensors)
    config = _config(file, tensors, header)
    layers, differences = {}, {}
    for name, found in parts.items():
        alpha, down, up = found.pop("alpha", None), found.pop("down", None), found.pop("up", None)
        if (down is None) != (up is None) or (down is None and alpha is not None):
            raise ValueError(f"lora.start.path: {file}: expected both matrices of {name}, got one or none")
        scale = 1.0
        if down is not None and up is not None:
            if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
                shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
                raise ValueError(f"lora.start.path: {file}: expected [rank, in] and [out, rank] of {name}, got {shapes}")
            scale = _scale(config, name, len(down)) if alpha is None else alpha.item() / len(down)
            layers[name] = LowRank(down.float(), up.float(), scale)
        for kind, values in found.items():
            if values.any():
                # PEFT scales the bias like the matrices; files with differences have no scale.
                differences[f"{name}.{kind}"] = values.float() * scale if config is not None else values.float()
    if not layers:
        raise ValueError(f"lora.start.path: {file}: expected the matrices of LoRA, got none")
    return LoraFile(layers, differences)


def _find(path: Path) -> Path:
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if not path.is_dir():
        raise ValueError(f"lora.start.path: expected a .safetensors file or a folder that holds one, got {path}")
    for name in (LORA_FILE, _PEFT_FILE):
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"lora.start.path: expected one .safetensors file in {path}, got {names}; name the file")
    return found[0]


def _by_layer(file: Path, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each layer by kind, under the layer's name in the model."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(f".{ending}")), None)
        layer = None if ending is None else _layer_name(key.removesuffix(f".{ending}"))
        if ending is None or layer is None:
            if tensor.is_floating_point() and not tensor.any():
                continue  # it adds nothing
            raise ValueError(f"lora.start.path: {file}: {key} is not known to be part of a LoRA; it cannot be left out")
        kind = _ENDINGS[ending]
        if kind in parts.setdefault(layer, {}):
            raise ValueError(f"lora.start.path: {file}: {layer} has two tensors for {kind}, {key} for one")
        parts[layer][kind] = tensor
    return parts


def _layer_name(name: str) -> str | None:
    """The model's name of a layer in a file."""
    for prefix in (_PEFT_PREFIX, _DIFFUSERS_PREFIX):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    if name.startswith(_KOHYA_PREFIX):
        # Dots became underscores, and names have other underscores too.
        match = re.fullmatch(r"blocks_(\d+)_(?:(self_attn|cross_attn)_(\w+)|(ffn)_(\d))", name.removeprefix(_KOHYA_PREFIX))
        return None if match is None else diffusers_name(".".join(["blocks", *filter(None, match.groups())]))
    native = diffusers_name(name.removeprefix(_COMFY_PREFIX))
    return native if native is not None or name.startswith(_COMFY_PREFIX) else name


def _config(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> dict[str, Any] | None:
    """PEFT's config, from the file or beside it."""
    beside = file.with_name(_PEFT_CONFIG)
    if _HEADER in header:
        where, text = f"the header of {file}", header[_HEADER]
    elif file.name == _PEFT_FILE and beside.is_file():
        where, text = str(beside), beside.read_text(encoding="utf-8")
    elif any(key.startswith(_PEFT_PREFIX) for key in tensors):
        raise ValueError(f"lora.start.path: expected {beside}, in which PEFT writes the strength of {file.name}")
    else:
        return None
    try:
        values = {key.removeprefix(_DIFFUSERS_PREFIX): value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"lora.start.path: {where} is damaged: {error}") from error
    if unknown := sorted(_beyond_lora(values)):
        raise ValueError(f"lora.start.path: {where}: {', '.join(unknown)}: not known here; expected plain LoRA")
    return values


def _beyond_lora(config: dict[str, Any]) -> Iterator[str]:
    """The entries of a config that make adapters anything else than plain LoRA."""
    plain = {"peft_type": "LORA", "bias": "none", "init_lora_weights": True, "megatron_core": "megatron.core"}
    plain = LoraConfig().to_dict() | plain
    for key, value in config.items():
        if key in _STRENGTH | _WITHOUT_EFFECT or not value or value == plain.get(key, ...):
            continue
        # These only initialize the matrices; other values change the weights too.
        if key == "init_lora_weights" and value in ("gaussian", "orthogonal", "eva"):
            continue
        yield f"{key}={value}"


def _scale(config: dict[str, Any] | None, layer: str, rank: int) -> float:
    if config is None:
        return 1.0
    alphas = config.get("alpha_pattern") or {}
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.get("lora_alpha", rank))
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
