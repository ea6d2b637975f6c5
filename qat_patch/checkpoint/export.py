"""Export: an ordinary folder of the host library, plus the metadata that says which attention the weights expect."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat_patch.metadata import CONFIG_KEYS, METHOD, AttentionMetadata
from qat_patch.patch import get_handle, require_handle
from qat_patch.version import __version__

from .golden_output import example_inputs as default_inputs
from .golden_output import write_reference
from .integrity import written_aside
from .k_shift import write_k_shift
from .load import load_part
from .manifest import ExportFolder, weight_files, write_manifest
from .model_card import model_card

_SHARD_SIZE = "5GB"


def export_checkpoint(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    merge_adapters: bool = True,
    example_inputs: dict[str, torch.Tensor] | None = None,
) -> Path:
    """Write a patched model as a folder that its host library loads, with or without this package.

    Weights and their names are those of the model. The config and the headers of the safetensors files carry the attention
    metadata; without this package the folder loads as a model with ordinary attention. K shifts stand in a file beside them. The
    folder is written aside, loaded once on the CPU to record what it makes of a reference input (`python -m qat_patch verify`
    repeats that), and renamed when it is complete.

    Args:
        model: a patched Transformers model, Diffusers transformer or Diffusers pipeline (which is saved whole), or a wrapper
            around a model.
        folder: where to; must not exist.
        tokenizer: saved into the folder too.
        training: how the weights were trained, plain values; goes into the metadata and the model card.
        metrics: what was measured, for the model card: name -> value.
        base_model: name or folder of the model that was fine-tuned; needed to export adapters alone.
        dtype: cast floating-point weights to it; default: as they are.
        merge_adapters: add PEFT adapters to the exported weights (the model itself keeps them). False: export the adapters
            alone, in PEFT's format; `load_checkpoint` then loads `base_model` too.
        example_inputs: the reference input, as tensors by argument name of the model's forward. Default: made from the
            config of a language model or a Wan transformer; other models have no reference without it.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched, the folder exists, or the arguments do not fit the model. Nothing has been
            written then.
    """
    folder = Path(folder)
    handle = get_handle(model)
    if handle is None:
        raise ValueError("export_checkpoint: the model is not patched; patch_model says what an export is to run")
    if folder.exists():
        raise ValueError(f"export_checkpoint: {folder} exists; choose another folder or remove it")
    is_pipeline = not isinstance(model, torch.nn.Module)
    modules = (module for part in handle.models for module in part.named_modules())
    if fused := next((name for name, module in modules if getattr(module, "fused_projections", False)), None):
        raise ValueError(
            "export_checkpoint: expected separate projections, which is how models load, got those of fuse_qkv_projections "
            f"({fused}); call unfuse_qkv_projections() on the model"
        )
    adapters = [part for part in handle.models if _adapter_layers(part)]
    if is_pipeline and (dtype is not None or adapters):
        raise ValueError(
            "export_checkpoint: a pipeline is saved as it is: expected no dtype and no adapters; fuse and unload adapters, and "
            "cast the pipeline, or export pipe.transformer"
        )
    if not merge_adapters and (not adapters or base_model is None or dtype is not None):
        raise ValueError(
            "export_checkpoint: merge_adapters=False needs a model with adapters and base_model, and takes no dtype; got "
            f"{len(adapters)} models with adapters, base_model={base_model!r}, dtype={dtype}"
        )
    if merge_adapters:
        for part in adapters:
            _check_mergeable(part)
    with written_aside(folder) as partial:
        if is_pipeline:
            model.save_pretrained(partial, max_shard_size=_SHARD_SIZE)
            parts = {_component_of(part, model): part for part in handle.models}
            metadata = {name: _add_metadata(partial / name, part, training) for name, part in parts.items()}
        elif merge_adapters:
            parts = {"": handle.models[0]}
            _save(_plain(parts[""], dtype), partial)
            metadata = {"": _add_metadata(partial, parts[""], training)}
        else:
            parts = {"": model}
            metadata = {"": _save_adapters(model, handle.models[0], partial, training)}
        kind = "pipeline" if is_pipeline else "model" if merge_adapters else "adapters"
        export = ExportFolder(folder=partial, kind=kind, metadata=metadata, base_model=None if merge_adapters else base_model)
        references = {}
        for name, part in parts.items():
            inputs = example_inputs or default_inputs(handle.models[0], handle.host)
            if inputs is not None:
                # Read back what was written. Adapters alone would need the base model a second time.
                written = load_part(export, name) if merge_adapters else part
                references[name] = write_reference(written, inputs, partial / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        first = next(iter(metadata.values()))
        write_manifest(dataclasses.replace(export, references=references))
        card = model_card(
            first,
            library=handle.host,
            class_name=type(model if is_pipeline else handle.models[0]).__name__,
            metrics=metrics or {},
            base_model=base_model,
            is_adapter=not merge_adapters,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def _component_of(part: Any, pipeline: Any) -> str:
    """The name of the pipeline's component that is a model, or has it in a wrapper such as torch.compile's."""
    components = {name: x for name, x in pipeline.components.items() if isinstance(x, torch.nn.Module)}
    return next(name for name, component in components.items() if any(module is part for module in component.modules()))


def _check_mergeable(model: Any) -> None:
    """Refuse with a ValueError what adapters have besides a change of one layer's weights."""
    for name, module in model.named_modules():
        if hasattr(module, "modules_to_save") or hasattr(module, "token_adapter"):
            raise ValueError(
                f"export_checkpoint: expected adapters that change the weights of layers, got {name}, a copy of a module that "
                "PEFT trained whole or in part (modules_to_save, trainable_token_indices); export what merge_and_unload() returns"
            )
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return
    tied = {id(x) for x in (model.get_input_embeddings(), model.get_output_embeddings()) if x is not None}
    if name := next((name for name, layer in _adapter_layers(model).items() if id(layer) in tied), None):
        raise ValueError(
            f"export_checkpoint: {name} has adapters, and the model shares its weights between input and output embeddings, of "
            "which the adapters change one; leave both out of target_modules, or train with config.tie_word_embeddings=False"
        )


def _save(model: Any, folder: Path) -> None:
    """`save_pretrained` without our quantizer, which writes metadata of its own and refuses to leave K shifts behind."""
    quantizer = model.__dict__.pop("hf_quantizer", None)
    try:
        model.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer


def _add_metadata(folder: Path, part: Any, training: dict[str, Any] | None) -> AttentionMetadata:
    """Put the metadata of a saved model into its config and weights, and K shifts beside them."""
    metadata, host = _metadata(folder, part, training), require_handle(part).host
    for file in weight_files(folder):
        _add_header(file, metadata)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[CONFIG_KEYS[host]] = metadata.to_dict()
    # In its order: of the patterns in a config the first one counts.
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return metadata


def _metadata(folder: Path, part: Any, training: dict[str, Any] | None) -> AttentionMetadata:
    handle = require_handle(part)
    return AttentionMetadata(
        config=handle.config,
        specs=handle.specs,
        k_shift=write_k_shift(folder, handle.k_shift),
        package_version=__version__,
        training=training,
    )


def _add_header(file: Path, metadata: AttentionMetadata) -> None:
    with safe_open(file, framework="pt") as weights:
        header = weights.metadata() or {}
    save_file(load_file(file), file, metadata={"format": "pt", **header, METHOD: metadata.to_json()})


def _save_adapters(model: Any, part: Any, folder: Path, training: dict[str, Any] | None) -> AttentionMetadata:
    """PEFT's files, with the metadata in their headers."""
    if hasattr(part, "save_lora_adapter"):
        part.save_lora_adapter(folder)
    elif hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        raise ValueError("export_checkpoint: pass the PEFT model itself, not the model inside or a wrapper around it")
    metadata = _metadata(folder, part, training)
    for file in weight_files(folder):
        _add_header(file, metadata)
    return metadata


def _adapter_layers(model: Any) -> dict[str, Any]:
    """The layers that PEFT has put adapters into, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}


def _plain(model: Any, dtype: torch.dtype | None) -> torch.nn.Module:
    """The model to save: itself, or a copy of its skeleton with adapters merged and weights cast."""
    adapters = _adapter_layers(model)
    if not adapters and dtype is None:
        return model
    state = model.state_dict()
    for name, layer in adapters.items():
        stored = {key: x.dtype for key, x in layer.get_base_layer().state_dict().items()}
        # In float32, so that the sum of weights and adapters is rounded once, to what is saved.
        merged = copy.deepcopy(layer).float()
        merged.merge(safe_merge=True)
        state = {key: x for key, x in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": x.to(dtype or stored[key]) for key, x in merged.get_base_layer().state_dict().items()}
    if dtype is not None:
        state = {key: x.to(dtype) if x.is_floating_point() else x for key, x in state.items()}
    with torch.device("meta"):
        plain: Any = _build(model)
    plain.load_state_dict(state, assign=True)
    if hasattr(model, "_weight_conversions"):
        plain._weight_conversions = model._weight_conversions  # how transformers gets back to the names of the checkpoint
    if hasattr(model, "generation_config"):
        plain.generation_config = model.generation_config
    if hasattr(plain, "tie_weights"):
        plain.tie_weights()
    return plain


def _build(model: Any) -> torch.nn.Module:
    """A model of the same class and config, without its weights, patch and adapters."""
    if require_handle(model).host == "diffusers":
        return type(model).from_config(model.config)
    return type(model)(copy.deepcopy(model.config))
