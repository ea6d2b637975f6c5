"""PEFT adapters in an export: added to the weights, or saved alone in the format that PEFT or Diffusers reads."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .manifest import MANIFEST, weight_files

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The file in which Diffusers pipelines look for adapters."""
LoraFormat = Literal["diffusers", "comfyui"]
_PREFIX = "transformer."
"""The prefix of names in that file. Wan 2.2's second transformer has the same: load_lora_weights has an argument for it."""
# Wan's own code, and so ComfyUI, has other names than Diffusers.
_COMFY_PREFIX = "diffusion_model."
_COMFY_NAMES = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "o",
    "add_k_proj": "k_img",
    "add_v_proj": "v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_DIFFUSERS_NAMES = {theirs: ours for ours, theirs in _COMFY_NAMES.items()}
_DIFFUSERS_NAMES_OUTSIDE_BLOCKS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "head.head": "proj_out",
}


def adapter_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The layers with PEFT adapters, by name; of nested ones (several parameters of one module) only the outermost."""
    found: dict[str, Any] = {}
    last = None
    for name, module in model.named_modules():
        if hasattr(module, "get_base_layer") and (last is None or not name.startswith(f"{last}.")):
            found[name], last = module, name
    return found


def adapter_owner(model: torch.nn.Module) -> Any:
    """The module that PEFT wrapped around a model, or the model itself if it holds the adapters; None without adapters."""
    return next((module for module in model.modules() if getattr(module, "peft_config", None)), None)


def check_mergeable(model: torch.nn.Module, part: Any) -> None:
    """Raise a ValueError if PEFT trained anything that cannot be merged into the layers' weights.

    Args:
        model: the exported model, with PEFT's wrapper if there is one.
        part: the patched model inside.
    """
    for config in _configs(model):
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise ValueError(
                f"export_checkpoint: expected adapters that change the weights of layers, got {type(config).__name__}, "
                "which trains something beside them; export it alone: merge_adapters=False, base_model=..."
            )
    layers = adapter_layers(part)
    for name, module in part.named_modules():
        if hasattr(module, "modules_to_save") or hasattr(module, "token_adapter"):
            raise ValueError(
                f"export_checkpoint: expected adapters that change the weights of layers, got {name}, a copy of a module that "
                "PEFT trained whole or in part (modules_to_save, trainable_token_indices); export what merge_and_unload() returns"
            )
        is_peft = type(module).__module__.partition(".")[0] == "peft"
        if is_peft and not any(name == layer or name.startswith(f"{layer}.") for layer in layers):
            raise ValueError(
                f"export_checkpoint: expected adapters that change the weights of layers, got {name}, a {type(module).__name__}; "
                "export it alone: merge_adapters=False, base_model=..."
            )
    if not getattr(getattr(part, "config", None), "tie_word_embeddings", False):
        return
    tied = {id(x) for x in (part.get_input_embeddings(), part.get_output_embeddings()) if x is not None}
    if tied_layer := next((name for name, layer in layers.items() if id(layer) in tied), None):
        raise ValueError(
            f"export_checkpoint: {tied_layer} has adapters, and the model shares its weights between input and output "
            "embeddings, of which the adapters change one; leave both out of target_modules, or train with "
            "config.tie_word_embeddings=False"
        )


def merged_state(name: str, layer: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of the layer inside an adapter layer, with the active adapters added to its weights in float32.

    Float32, so that the sum of weights and adapters is rounded only once, when it is saved.

    Args:
        name, layer: a layer with adapters.
        state: the state of the whole model, with all weights in memory.
    """
    # Accelerate's hooks hold the weights of the whole model if these are offloaded, so the copy leaves them out.
    hooks = {id(hook): None for module in layer.modules() if (hook := getattr(module, "_hf_hook", None)) is not None}
    merged = copy.deepcopy(layer, hooks)
    own = {key.removeprefix(f"{name}."): x.clone() for key, x in state.items() if key.startswith(f"{name}.")}
    merged.load_state_dict(own, assign=True)
    merged.float()
    try:
        for module in _tuner_layers(merged):
            if module.disable_adapters:
                if module.merged:
                    module.unmerge()
            elif not module.merged:
                module.merge(safe_merge=True)
    except Exception as error:
        raise ValueError(
            f"export_checkpoint: PEFT cannot add the adapters of {name} ({type(layer).__name__}) to its weights: "
            f"{error or type(error).__name__}; export them alone: merge_adapters=False, base_model=..."
        ) from error
    inside: dict[str, torch.Tensor] = merged.get_base_layer().state_dict()
    return inside


def the_active_adapter(model: torch.nn.Module) -> str:
    """The name of the one adapter that an adapters-only export saves.

    Raises:
        ValueError: no adapter or several are active, or they act in a way that PEFT's files cannot express.
    """
    layers = list(_tuner_layers(model))
    way_out = "or export merged weights (merge_adapters=True)"
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(f"export_checkpoint: adapters are switched off, which their files cannot say; enable them, {way_out}")
    if any(layer.merged for layer in layers):
        raise ValueError(f"export_checkpoint: adapters are merged into the weights; unmerge them, {way_out}")
    names = sorted({name for layer in layers for name in layer.active_adapters})
    if not layers:
        owner = adapter_owner(model)
        names = list(owner.active_adapters)
    if len(names) != 1:
        raise ValueError(
            f"export_checkpoint: expected one adapter in force, got {', '.join(names) or 'none'}; activate one of them "
            f"(set_adapter), {way_out}"
        )
    return names[0]


def save_adapter(model: torch.nn.Module, host: str, folder: Path, lora_format: LoraFormat) -> None:
    """Write the active adapter in the format of its library. Its strength is multiplied into its weights."""
    name, owner = the_active_adapter(model), adapter_owner(model)
    if host == "transformers":
        options = {"selected_adapters": [name]} if hasattr(owner, "base_model") and hasattr(owner, "get_base_model") else {}
        owner.save_pretrained(folder, **options)
        for name_of_file in ("README.md", MANIFEST):  # the export writes its own later
            (folder / name_of_file).unlink(missing_ok=True)
        if (folder / name).is_dir():  # PEFT puts every adapter but `default` into a subfolder
            for file in (folder / name).iterdir():
                shutil.move(file, folder / file.name)
            (folder / name).rmdir()
        _multiply_in(model, name, folder)
        return
    from peft.utils import get_peft_model_state_dict

    state = {
        key.removeprefix("base_model.model."): x.detach().cpu().contiguous()
        for key, x in get_peft_model_state_dict(owner, adapter_name=name).items()
    }
    header = {"format": "pt"}
    if lora_format == "comfyui":
        state = _comfy_state(model, name, state)
    else:
        config = {key: sorted(x) if isinstance(x, set) else x for key, x in owner.peft_config[name].to_dict().items()}
        config = {f"{_PREFIX}{key}": x for key, x in config.items() if key != "base_model_name_or_path"}
        header["lora_adapter_metadata"] = json.dumps(config, indent=2, sort_keys=True)
        state = {f"{_PREFIX}{key}": x for key, x in state.items()}
    save_file(state, folder / LORA_FILE, metadata=header)
    if lora_format == "diffusers":
        _multiply_in(model, name, folder)


def load_adapter(model: Any, file: Path) -> None:
    """Put adapters from a file of `save_adapter` into a Diffusers transformer; older exports have no prefix."""
    with safe_open(file, framework="pt") as stored:
        names = list(stored.keys())
    if all(name.startswith(_COMFY_PREFIX) for name in names):
        from diffusers import WanPipeline

        model.load_lora_adapter(WanPipeline.lora_state_dict(load_file(file)), prefix="transformer")
        return
    prefix = "transformer" if all(name.startswith(_PREFIX) for name in names) else None
    model.load_lora_adapter(str(file.parent), prefix=prefix, weight_name=file.name)


def _configs(model: torch.nn.Module) -> list[Any]:
    owner = adapter_owner(model)
    return [] if owner is None else list(owner.peft_config.values())


def _tuner_layers(model: torch.nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if hasattr(module, "get_base_layer"))


def _strengths(model: torch.nn.Module, adapter: str) -> dict[str, float]:
    """For each layer, how much stronger its adapter acts than its config says (set_adapters(weights=...), set_scale)."""
    strengths = {}
    for name, layer in model.named_modules():
        scaling = getattr(layer, "scaling", {}) if hasattr(layer, "get_base_layer") else {}
        # AdaLoRA scales by its current rank, which PEFT's set_scale ignores.
        if adapter not in scaling or hasattr(layer, "ranknum"):
            continue
        now = scaling[adapter]
        try:
            layer.set_scale(adapter, 1)
            strengths[name] = now / scaling[adapter]
        finally:
            scaling[adapter] = now
    return {name: strength for name, strength in strengths.items() if not math.isclose(strength, 1, rel_tol=1e-6)}


def _multiply_in(model: torch.nn.Module, adapter: str, folder: Path) -> None:
    strengths = _strengths(model, adapter)
    if not strengths:
        return
    (file,) = weight_files(folder)
    with safe_open(file, framework="pt") as stored:
        header = stored.metadata()
    tensors = load_file(file)
    for layer, strength in strengths.items():
        ours = [key for key in tensors if f".{layer}.lora_B." in f".{key}" or f".{layer}.lora_embedding_B" in f".{key}"]
        if not ours:
            raise ValueError(
                f"export_checkpoint: the adapter of {layer} acts {strength:.3g} times as strongly as its config says, which only "
                "files of LoRA can hold; set its strength to 1, or export merged weights (merge_adapters=True)"
            )
        for key in ours:
            tensors[key] = tensors[key] * strength
    save_file(tensors, file, metadata=header)


def check_comfy(model: Any, adapter: str | None = None) -> None:
    """Raise a ValueError for adapters that ComfyUI's format has no names for: it knows only LoRA of a Wan transformer's blocks.

    `adapter`: check only the layers with the adapter of this name; default: all.
    """
    for name, layer in adapter_layers(model).items():
        if adapter is not None and adapter not in getattr(layer, "lora_A", {adapter}):
            continue
        if "lora_A" not in dict(layer.named_children()) or any(layer.use_dora.values()) or _comfy_name(name) is None:
            raise ValueError(
                f"export_checkpoint: lora_format='comfyui': expected LoRA of the attention and feed-forward layers of a Wan "
                f"transformer, got {name} ({type(layer).__name__}); use lora_format='diffusers'"
            )


def _comfy_name(layer: str) -> str | None:
    """`blocks.0.self_attn.q` of `blocks.0.attn1.to_q`."""
    blocks, _, rest = layer.partition(".")
    number, _, rest = rest.partition(".")
    if blocks != "blocks" or not number.isdigit():
        return None
    if rest in _COMFY_NAMES:  # a feed-forward layer
        return f"blocks.{number}.{_COMFY_NAMES[rest]}"
    attention, _, projection = rest.partition(".")
    if attention not in ("attn1", "attn2") or projection not in _COMFY_NAMES:
        return None
    return f"blocks.{number}.{_COMFY_NAMES[attention]}.{_COMFY_NAMES[projection]}"


def diffusers_name(layer: str) -> str | None:
    """Diffusers' name of a layer of Wan's own code (`blocks.0.self_attn.q`: `blocks.0.attn1.to_q`); None if it has none."""
    blocks, _, rest = layer.partition(".")
    number, _, rest = rest.partition(".")
    if blocks != "blocks" or not number.isdigit():
        return _DIFFUSERS_NAMES_OUTSIDE_BLOCKS.get(layer)
    if rest.startswith("ffn."):
        return f"blocks.{number}.{_DIFFUSERS_NAMES[rest]}" if rest in _DIFFUSERS_NAMES else None
    part, _, inside = rest.partition(".")
    if part in ("self_attn", "cross_attn"):
        inside = inside if inside in ("norm_q", "norm_k") else _DIFFUSERS_NAMES.get(inside, "")
        return f"blocks.{number}.{_DIFFUSERS_NAMES[part]}.{inside}" if inside else None
    return f"blocks.{number}.norm2" if rest == "norm3" else None


def _comfy_state(model: torch.nn.Module, adapter: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """ComfyUI's names, and each layer's strength as its `alpha`: ComfyUI multiplies by alpha / rank."""
    named = {}
    for layer, module in adapter_layers(model).items():
        prefix = f"{_COMFY_PREFIX}{_comfy_name(layer)}"
        for key, x in state.items():
            if key.startswith(f"{layer}."):
                named[f"{prefix}{key.removeprefix(layer)}"] = x
        named[f"{prefix}.alpha"] = torch.tensor(float(module.scaling[adapter] * module.r[adapter]))
    return named
