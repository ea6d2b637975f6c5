"""What can be exported. Everything else is refused here, before anything is written."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from qat_patch.handle import PatchHandle
from qat_patch.linear.handle import LinearHandle, get_linear_handle
from qat_patch.metadata import LOADING_ADAPTERS
from qat_patch.servers import check_servable

from .adapters import adapter_layers, adapter_owner, check_comfy, check_mergeable, the_active_adapter
from .trust.allowed_keys import is_component
from .weights import quantized_by_others


def plain_values(training: dict[str, Any] | None) -> dict[str, Any] | None:
    """The description of a training, without paths of this machine, which mean nothing elsewhere."""
    if training is None:
        return None
    values: dict[str, Any] = _without_paths(training)
    try:
        json.dumps(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"export_checkpoint: training: expected plain values (texts, numbers, lists, dicts): {error}") from error
    return values


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(x) for key, x in value.items() if not _is_path(x)}
    if isinstance(value, list | tuple):
        return [_without_paths(x) for x in value if not _is_path(x)]
    return value


def _is_path(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, Path)
    # A name on the Hub has a slash too, but its first part is not a folder here.
    first = value.partition("/")[0] if "/" in value else value
    return value.startswith(("/", "~", "./", "../")) or (bool(first) and len(value) < 1024 and os.path.exists(first))


def check_attention(handle: PatchHandle) -> None:
    """Raise a ValueError if the loaded model would have other attention modules."""
    handle.check_in_force("export_checkpoint")
    modules = (module for part in handle.models for module in part.named_modules())
    if fused := next((name for name, module in modules if getattr(module, "fused_projections", False)), None):
        raise ValueError(
            "export_checkpoint: expected separate projections, which is how models load, got those of fuse_qkv_projections "
            f"({fused}); call unfuse_qkv_projections() on the model"
        )


def check_weights(handle: PatchHandle) -> None:
    """Raise a ValueError for weights that are not ordinary tensors."""
    for part in handle.models:
        if (reason := quantized_by_others(part)) is not None:
            raise ValueError(
                f"export_checkpoint: expected weights as ordinary tensors, got a {type(part).__name__} {reason}; export adapters "
                "alone (merge_adapters=False, base_model=...), or call model.dequantize() first if its library can, or load "
                "the model without quantization and add the adapters to that"
            )


def check_adapters(
    model: Any, handle: PatchHandle, kind: str, base_model: str | None, dtype: torch.dtype | None, lora_format: str
) -> None:
    """Raise a ValueError for adapters or arguments that do not fit this kind of export."""
    adapters = [part for part in handle.models if adapter_layers(part)]
    owner = None if kind == "pipeline" else adapter_owner(model)
    if kind == "pipeline" and (dtype is not None or adapters):
        raise ValueError(
            "export_checkpoint: a pipeline is saved as it is: expected no dtype and no adapters; fuse and unload adapters, and "
            "cast the pipeline, or export pipe.transformer"
        )
    if lora_format not in ("diffusers", "comfyui"):
        raise ValueError(f"export_checkpoint: lora_format: expected 'diffusers' or 'comfyui', got {lora_format!r}")
    if lora_format == "comfyui" and (kind != "adapters" or handle.host != "diffusers"):
        raise ValueError(
            "export_checkpoint: lora_format='comfyui' is for adapters alone (merge_adapters=False) of a Wan transformer"
        )
    if kind == "adapters":
        if (not adapters and owner is None) or base_model is None or dtype is not None:
            raise ValueError(
                "export_checkpoint: merge_adapters=False needs a model with adapters and base_model, and takes no dtype; got "
                f"{len(adapters)} models with adapters, base_model={base_model!r}, dtype={dtype}"
            )
        if owner is None:
            raise ValueError("export_checkpoint: pass the PEFT model itself, not the model inside or a wrapper around it")
        the_active_adapter(model)
        if lora_format == "comfyui":
            check_comfy(adapters[0])
    elif kind == "model":
        check_mergeable(model, handle.models[0])


def check_linears(handle: PatchHandle, kind: str, *, is_measured: bool = True) -> LinearHandle | None:
    """The quantized linear layers of the exported model, if any. `is_measured`: the ranges of their inputs are measured.

    Raises:
        ValueError: no known library could read the export, or it would compute something else.
    """
    linears = next((found for part in handle.models if (found := get_linear_handle(part)) is not None), None)
    if linears is None:
        return None
    try:
        linears.check_in_force("quantized linear layers")
        if is_measured:
            _ = linears.scales
    except ValueError as error:
        raise ValueError(f"export_checkpoint: {error}") from None
    if handle.host != "transformers" or kind == "pipeline":
        raise ValueError(
            f"export_checkpoint: no library is known that reads packed linear layers of a {type(linears.model).__name__}: "
            "expected a model of transformers; call unquantize_linears(model) to export the weights as they are, unrounded"
        )
    if linears.experts:
        raise ValueError(
            f"export_checkpoint: servers take experts for quantized too, and {linears.experts[0]} is not: expected a dense "
            "model; call unquantize_linears(model) to export the weights as they are"
        )
    if getattr(linears.model, "_weight_conversions", None):
        raise ValueError(
            f"export_checkpoint: {type(linears.model).__name__} stores its weights under other names than it has them, which "
            "packed weights have not been tried with; call unquantize_linears(model) to export them as they are"
        )
    beside = sorted((adapter_layers(linears.model).keys() & linears.layers.keys()) - linears.merged.keys())
    if kind == "model" and beside:
        raise ValueError(
            f"export_checkpoint: {beside[0]} has adapters beside a quantized weight: merged, their sum would be rounded to 4 "
            "bits, and most of what they have learned would be lost. Export them alone (merge_adapters=False), or train for "
            "merged weights: quantize_linears(model, merge_adapters=True), after the adapters were added"
        )
    if kind == "adapters" and linears.merged:
        raise ValueError(
            f"export_checkpoint: the adapters of {next(iter(linears.merged))} were trained for merged weights, whose sum is "
            "rounded: expected merge_adapters=True, or quantize_linears(model, merge_adapters=False) before training"
        )
    return linears


def check_server(
    server: str | None, auto_enable: bool, model: Any, handle: PatchHandle, kind: str, linears: LinearHandle | None
) -> None:
    """Raise a ValueError if the server could not run the export."""
    if server is None:
        if auto_enable:
            raise ValueError("export_checkpoint: auto_enable: has no effect without server='vllm'; leave it out")
        return
    adapters = adapter_owner(model).peft_config[the_active_adapter(model)] if kind == "adapters" else None
    try:
        check_servable(server, handle, adapters=adapters, auto_enable=auto_enable, linears=linears)
    except ValueError as error:
        raise ValueError(f"export_checkpoint: {error}") from None


def public_class(part: torch.nn.Module, host: str) -> str:
    """The host library's class for a model: its own class, or the nearest base class of a user's subclass."""
    library: Any = sys.modules[host]
    for kind in type(part).__mro__:
        found: Any = getattr(library, kind.__name__, None)
        forward = getattr(found, "forward", None)
        if found is kind and forward not in (None, torch.nn.Module.forward):
            return kind.__name__
    raise ValueError(
        f"export_checkpoint: expected a class of {host}, got {type(part).__module__}.{type(part).__name__}, whose code "
        "load_checkpoint would have to find and run; save_pretrained writes such models, with what was patched in the config"
    )


def check_components(pipeline: Any) -> None:
    """Raise a ValueError for a pipeline with components that would not be loaded."""
    for name, value in pipeline.config.items():
        if isinstance(value, list | tuple) and not is_component([*value]):
            raise ValueError(
                f"export_checkpoint: {name}: expected a class of diffusers or transformers, got {value!r}, which load_checkpoint "
                "would not load; replace this component, or export pipe.transformer"
            )


def component_name(component: str | None, handle: PatchHandle, *, is_pipeline: bool) -> str | None:
    """Which component of its pipeline a transformer is: the caller says so, or the name of the folder it was loaded from."""
    if component is not None and (is_pipeline or handle.host != "diffusers" or component not in LOADING_ADAPTERS):
        raise ValueError(
            f"export_checkpoint: component: expected {' or '.join(LOADING_ADAPTERS)} for a Diffusers transformer alone, got "
            f"{component!r}"
        )
    if component is None and not is_pipeline and handle.host == "diffusers":
        config: Any = handle.models[0].config
        folder = Path(str(config.get("_name_or_path"))).name
        return folder if folder in LOADING_ADAPTERS else None
    return component
