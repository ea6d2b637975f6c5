"""Export: an ordinary folder of the host library, plus the metadata that says which attention the weights expect."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qat_patch.linear.handle import LinearHandle
from qat_patch.linear.packed import packed_state, record_of
from qat_patch.metadata import CONFIG_KEYS, METHOD, AttentionMetadata, config_entries, without_entries
from qat_patch.patch import get_handle, require_handle
from qat_patch.servers import Server
from qat_patch.serving import Exported, write_serving

from .adapters import LoraFormat, adapter_layers, adapter_owner, merged_state, save_adapter
from .exportable import (
    check_adapters,
    check_attention,
    check_components,
    check_linears,
    check_server,
    check_weights,
    component_name,
    plain_values,
    public_class,
)
from .golden_output import dtype_of, live_outputs, write_reference
from .golden_output import example_inputs as default_inputs
from .integrity import written_aside
from .load import COMPONENT, load_part, load_pipeline
from .manifest import ExportFolder, leave_out_unknown_keys, write_manifest
from .model_card import model_card
from .record import attention_in_force
from .shifts import write_shifts
from .trust.headers import weight_files
from .trust.system import check_system
from .weights import as_dtype, exported_dtype, offloaded_weights, quantized_by_others

_log = logging.getLogger(__name__)
_SHARD_SIZE = "5GB"


def export_checkpoint(
    model: Any,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    training: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
    base_model: str | None = None,
    dtype: torch.dtype | str | None = None,
    merge_adapters: bool = True,
    lora_format: LoraFormat = "diffusers",
    component: str | None = None,
    example_inputs: dict[str, torch.Tensor] | None = None,
    server: Server | None = None,
    auto_enable: bool = False,
) -> Path:
    """Save a patched model to a folder that its host library loads, with or without this package.

    Weights keep their names. The config and the headers of the safetensors files carry the attention metadata; K and Q shifts
    have a file of their own each. Without this package the folder loads as a model with ordinary attention. If linear layers are
    quantized (`quantize_linears`), their weights are packed in the layout of compressed-tensors; the config then names that
    layout, and the attention metadata is in `qat_patch.json`. The folder is written under a temporary name, loaded once on the
    CPU and compared with the model by what both make of a reference input (`python -m qat_patch verify` repeats that), and
    renamed when it is complete.

    Args:
        model: a patched Transformers model, Diffusers transformer or Diffusers pipeline (which is saved whole), or a wrapper
            around a model.
        folder: where to; must not exist.
        tokenizer: saved into the folder too.
        training: how the weights were trained, plain values; goes into the metadata and the model card. Names of files and
            folders of this machine are left out.
        metrics: what was measured, for the model card: name -> value.
        base_model: name or folder of the model that was fine-tuned; needed to export adapters alone.
        dtype: cast floating-point weights to it, except those that the host library keeps in float32; default: no cast.
        merge_adapters: add PEFT adapters to the exported weights, as strongly as they act now and not at all where they are
            switched off (the model itself keeps them). False: export the one adapter that is in force alone; its strength is
            multiplied into its weights, and its name becomes `default`. `load_checkpoint` then loads `base_model` too.
        lora_format: how adapters alone of a Diffusers model are named. "diffusers": as `pipe.load_lora_weights` and
            `pipe.save_lora_weights` name them; "comfyui": as ComfyUI does (Wan only), which `pipe.load_lora_weights` reads too.
        component: which component of its pipeline a Diffusers transformer is: "transformer", "transformer_2" (Wan 2.2),
            "transformer_ref" (MiniMax-H3) or "unconditional_transformer" (Ideogram 4). Default: as the model was loaded, if its
            pipeline was loaded from a folder or from the Hub.
        example_inputs: the reference input, as tensors by argument name of the model's forward. Default: made from the
            config of a model that reads token ids or a Wan transformer; other models have no reference without it.
        server: what the folder is for: "vllm" or "sglang" with a preset of their NVFP4 KV caches, "diffusers-sage3" with `sage3`
            (docs/SERVERS.md). No config of it has a key of this package then, since servers refuse what they do not know, and
            any library loads it as an ordinary model; SERVING.md says how to serve it, and `qat_patch.json` what
            `load_checkpoint` patches. Default: an export for this package.
        auto_enable: for vLLM: add the file that makes it use the NVFP4 KV cache by itself.

    Returns:
        The folder.

    Raises:
        ValueError: the model is not patched, the folder exists, the arguments do not fit the model, the server does not compute
            what the model was patched for, the host library could not load what would be written, or it would compute
            something else. Nothing has been written then.
    """
    check_system("export_checkpoint")
    folder = Path(folder)
    handle = get_handle(model)
    if handle is None:
        raise ValueError("export_checkpoint: the model is not patched; call patch_model first, with what the export is to run")
    handle.check_in_force("export_checkpoint")
    if folder.exists():
        raise ValueError(f"export_checkpoint: {folder} exists; choose another folder or remove it")
    dtype = as_dtype(dtype, "export_checkpoint")
    training = plain_values(training)
    is_pipeline = not isinstance(model, torch.nn.Module)
    kind = "pipeline" if is_pipeline else "model" if merge_adapters else "adapters"
    check_attention(handle)
    check_adapters(model, handle, kind, base_model, dtype, lora_format)
    if kind != "adapters":
        check_weights(handle)
    linears = check_linears(handle, kind)
    linear = None if linears is None else record_of(linears)
    check_server(server, auto_enable, model, handle, kind, linears)
    classes = {id(part): public_class(part, handle.host) for part in handle.models}
    if is_pipeline:
        check_components(model)
        parts = {_component_of(part, model): part for part in handle.models}
    else:
        parts = {"": handle.models[0]}
    component = component_name(component, handle, is_pipeline=is_pipeline)
    references: dict[str, Any] = {}
    found = {name: example_inputs or default_inputs(part, handle.host) for name, part in parts.items()}
    inputs = {name: x for name, x in found.items() if x is not None}
    # Computed, as all that can fail for a reason in the model, before anything is written.
    # Packed weights are rounded once, from what they are trained in.
    kept = set() if linears is None else {f"{name}.weight" for name in linears.layers}
    merged = _plain(parts[""], dtype, kept) if kind == "model" else None
    live = {
        name: live_outputs(part if is_pipeline else _outermost(model, part), inputs[name], is_default=not example_inputs)
        for name, part in parts.items()
        if name in inputs
    }
    with written_aside(folder) as partial:
        if is_pipeline:
            model.save_pretrained(partial, max_shard_size=_SHARD_SIZE)
        elif merged is not None:
            _save(merged, linears, partial)
        else:
            save_adapter(model, handle.host, partial, lora_format)
        metadata = {name: _add_metadata(partial / name, part, training, component) for name, part in parts.items()}
        if kind != "adapters":
            for name, part in parts.items():
                entries = {} if server else config_entries(handle.host, metadata[name])
                if linear is not None:
                    entries = {CONFIG_KEYS["transformers"]: linear.quantization_config}
                _complete_config(partial / name, classes[id(part)], entries)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        leave_out_unknown_keys(partial, linear)
        if server is not None:
            place = Exported(folder=partial, kind=kind, base_model=base_model, component=component)
            write_serving(server, handle, place, auto_enable=auto_enable, linears=linears)
        base = None if merge_adapters else base_model
        export = ExportFolder(folder=partial, kind=kind, metadata=metadata, base_model=base, server=server, linear=linear)
        for name, written in _read_back(export, model, parts).items():
            if name in live:
                expected = None if quantized_by_others(parts[name]) else live[name]
                is_exact = _is_exact(parts[name]) and _is_exact(written)
                references[name] = write_reference(written, inputs[name], export.reference(name), expected, is_exact=is_exact)
        first = next(iter(metadata.values()))
        write_manifest(dataclasses.replace(export, references=references))
        card = model_card(
            first,
            model=model if is_pipeline else handle.models[0],
            library=handle.host,
            metrics=metrics or {},
            base_model=base_model,
            component=component,
            is_adapter=not merge_adapters,
            server=server,
            linear=linear,
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
    return folder


def _component_of(part: Any, pipeline: Any) -> str:
    """The name of the pipeline's component that is a model, or has it in a wrapper such as torch.compile's."""
    components = {name: x for name, x in pipeline.components.items() if isinstance(x, torch.nn.Module)}
    return next(name for name, component in components.items() if any(module is part for module in component.modules()))


def _outermost(model: torch.nn.Module, part: torch.nn.Module) -> torch.nn.Module:
    """What computes with adapters: what PEFT has wrapped around a model, else the model."""
    owner = adapter_owner(model)
    return part if owner is None else owner


def _read_back(export: ExportFolder, model: Any, parts: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """What was written, loaded as `load_checkpoint` and `verify_checkpoint` do.

    Adapters alone whose base model is somewhere else cannot be: then it is the model itself, if its weights are ordinary.
    """
    if export.base_model is not None and not _is_here(export.base_model):
        _log.warning(
            "export_checkpoint: %s is not on this machine, so the adapters were not read back; `qat-patch verify` does that",
            export.base_model,
        )
        return {} if quantized_by_others(parts[""]) else {"": _outermost(model, parts[""])}
    if export.kind == "pipeline":
        pipeline = load_pipeline(export)
        return {name: getattr(pipeline, name) for name in parts}
    try:
        return {"": load_part(export, "", dtype_of(parts[""]) if export.kind == "adapters" else "auto")}
    except ValueError as error:
        way_out = "; export merged weights (merge_adapters=True)" if export.kind == "adapters" else ""
        raise ValueError(f"export_checkpoint: what would be written cannot be loaded: {error}{way_out}") from error


def _is_here(name: str) -> bool:
    """Whether a model is a folder, or in the cache of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "model_index.json")
    if Path(name).exists():
        return True
    try:
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)
    except ValueError:  # no name that the Hub could know
        return False


def _is_exact(model: torch.nn.Module) -> bool:
    return all(x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) for x in model.parameters())


def _add_metadata(folder: Path, part: Any, training: dict[str, Any] | None, component: str | None) -> AttentionMetadata:
    """Put the metadata of a saved model into the headers of its weights, and shifts beside them."""
    found = attention_in_force(part)
    assert found is not None  # the handle of the caller
    metadata = dataclasses.replace(found[0], training=training)
    write_shifts(folder, found[1])
    header = {METHOD: metadata.to_json()} | ({} if component is None else {COMPONENT: component})
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            stored = weights.metadata() or {}
        save_file(load_file(file), file, metadata={"format": "pt", **stored, **header})
    return metadata


def _save(model: Any, linears: LinearHandle | None, folder: Path) -> None:
    """Save a model of a host library, with the weights of quantized linear layers packed."""
    packed = {} if linears is None else {"state_dict": packed_state(model.state_dict(), linears)}
    model.save_pretrained(folder, max_shard_size=_SHARD_SIZE, **packed)


def _complete_config(folder: Path, class_name: str, entries: dict[str, Any]) -> None:
    """Put the class, and what is to stand there about quantization, into the config of a saved model."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    host = "diffusers" if "_class_name" in config else "transformers"
    if host == "diffusers":
        config["_class_name"] = class_name
    else:
        config["architectures"] = [class_name]
    # At the end, and in its order: of the patterns in a config the first one counts.
    config = without_entries(host, config) | entries
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plain(model: Any, dtype: torch.dtype | None, kept: set[str]) -> Any:
    """The model to save: itself, or a copy of its skeleton with adapters merged and weights cast, except those that are kept."""
    adapters, state = adapter_layers(model), model.state_dict()
    is_offloaded = any(x.is_meta for x in state.values())
    if not adapters and dtype is None and not is_offloaded:
        return model
    if is_offloaded:
        state |= offloaded_weights(model)
        if lost := next((key for key, x in state.items() if x.is_meta), None):
            raise ValueError(
                f"export_checkpoint: {lost} has no values: PEFT leaves adapters without them where the layer is on disk; load "
                "the model into memory and add them there"
            )
    own = {key: x.dtype for key, x in state.items()}
    for name, layer in adapters.items():
        merged = merged_state(name, layer, state)
        state = {key: x for key, x in state.items() if not key.startswith(f"{name}.")}
        own |= {f"{name}.{key}": x.dtype for key, x in layer.get_base_layer().state_dict().items()}
        state |= {f"{name}.{key}": x for key, x in merged.items()}
    state = {key: x if key in kept else x.to(exported_dtype(model, key, own[key], dtype)) for key, x in state.items()}
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
