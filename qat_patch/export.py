"""Export: an ordinary folder of the host library, plus a block that says which attention the weights expect."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .block import ADAPTER_FILE, CONFIG_KEYS, METHOD, AttentionBlock
from .card import model_card
from .patch import get_handle

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
) -> Path:
    """Write a patched model as a folder that its host library loads, with or without this package.

    Weights and their names are those of the model. The config and the headers of the safetensors files carry the attention
    block; without this package the folder loads as a model with ordinary attention. The folder is written aside and renamed
    when it is complete.

    Args:
        model: a patched Transformers model, Diffusers transformer or Diffusers pipeline (which is saved whole), or a wrapper
            around a model.
        folder: where to; must not exist.
        tokenizer: saved into the folder too.
        training: how the weights were trained, plain values; goes into the block and the model card.
        metrics: what was measured, for the model card: name -> value.
        base_model: name or folder of the model that was fine-tuned; needed to export adapters alone.
        dtype: cast floating-point weights to it; default: as they are.
        merge_adapters: add PEFT adapters to the exported weights (the model itself keeps them). False: export the adapters
            alone, in PEFT's format; `load_checkpoint` then loads `base_model` too.

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
    part = handle.models[0]
    block = _block(part, training)
    with _written_aside(folder) as partial:
        if is_pipeline:
            model.save_pretrained(partial, max_shard_size=_SHARD_SIZE)
            names = {id(component): name for name, component in model.components.items()}
            for part in handle.models:
                _add_block(partial / names[id(part)], handle.host, _block(part, training))
        elif merge_adapters:
            _plain(part, dtype).save_pretrained(partial, max_shard_size=_SHARD_SIZE)
            _add_block(partial, handle.host, block)
        else:
            _save_adapters(model, part, partial, base_model, block)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        card = model_card(
            block,
            library=handle.host,
            class_name=type(model if is_pipeline else part).__name__,
            metrics=metrics or {},
            base_model=base_model,
            is_adapter=not merge_adapters,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` that takes its name at the end, or disappears after an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _block(model: torch.nn.Module, training: dict[str, Any] | None) -> AttentionBlock:
    from . import __version__

    handle = get_handle(model)
    return AttentionBlock(config=handle.config, modules=tuple(handle.patched), package_version=__version__, training=training)


def _adapter_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that PEFT has put adapters into, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "get_base_layer")}


def _plain(model: torch.nn.Module, dtype: torch.dtype | None) -> torch.nn.Module:
    """The model to save: itself, or a copy of its skeleton with adapters merged and weights cast."""
    adapters = _adapter_layers(model)
    if not adapters and dtype is None:
        return model
    state = model.state_dict()
    for name, layer in adapters.items():
        merged = copy.deepcopy(layer)
        merged.merge(safe_merge=True)
        state = {key: x for key, x in state.items() if not key.startswith(f"{name}.")}
        state |= {f"{name}.{key}": x for key, x in merged.get_base_layer().state_dict().items()}
    if dtype is not None:
        state = {key: x.to(dtype) if x.is_floating_point() else x for key, x in state.items()}
    with torch.device("meta"):
        plain = _build(model)
    plain.load_state_dict(state, assign=True)
    if hasattr(model, "_weight_conversions"):
        plain._weight_conversions = model._weight_conversions  # how transformers gets back to the names of the checkpoint
    if hasattr(model, "generation_config"):
        plain.generation_config = model.generation_config
    if hasattr(plain, "tie_weights"):
        plain.tie_weights()
    return plain


def _build(model: torch.nn.Module) -> torch.nn.Module:
    """A model of the same class and config, without its weights, patch and adapters."""
    if get_handle(model).host == "diffusers":
        return type(model).from_config(model.config)
    return type(model)(copy.deepcopy(model.config))


def _add_block(folder: Path, host: str, block: AttentionBlock) -> None:
    """Put the block into the config and the weights of a saved model."""
    for file in sorted(folder.glob("*.safetensors")):
        _add_header(file, block)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config[CONFIG_KEYS[host]] = block.to_dict()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_header(file: Path, block: AttentionBlock) -> None:
    with safe_open(file, framework="pt") as weights:
        metadata = weights.metadata() or {}
    save_file(load_file(file), file, metadata={"format": "pt", **metadata, METHOD: block.to_json()})


def _save_adapters(model: torch.nn.Module, part: torch.nn.Module, folder: Path, base_model: str, block: AttentionBlock) -> None:
    """PEFT's files, and a file of ours that names the base model and holds the block."""
    if hasattr(part, "save_lora_adapter"):
        part.save_lora_adapter(folder)
    elif hasattr(model, "peft_config"):
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    else:
        raise ValueError("export_checkpoint: pass the PEFT model itself, not the model inside or a wrapper around it")
    for file in folder.glob("*.safetensors"):
        _add_header(file, block)
    content = {"base_model": base_model, "attention": block.to_dict()}
    (folder / ADAPTER_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
