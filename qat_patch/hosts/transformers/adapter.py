"""Transformers: what can be patched in a model, and how the model is pointed at 4-bit attention (attention.py) and back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch

from qat_kernels import QuantSpec
from qat_patch.config import head_dim_problem
from qat_patch.layer import AttentionLayer
from qat_patch.metadata import CONFIG_KEYS, METHOD, AttentionMetadata

from .attention import LAYER, attention_forward, compact_mask

MECHANISM = "transformers' AttentionInterface"
NAME = "qat_fp4"
"""The name of 4-bit attention among transformers' attention implementations."""


def owns(model: object) -> bool:
    """Whether this is a model of transformers; does not import it."""
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def pipeline_models(pipeline: object) -> dict[str, torch.nn.Module]:
    """None: pipelines of transformers keep one model, which is passed itself."""
    return {}


def stored_metadata(model: Any) -> AttentionMetadata | None:
    """The metadata that an export of this package left in the model's config."""
    stored = getattr(model.config, CONFIG_KEYS["transformers"], None)
    if isinstance(metadata := getattr(stored, "metadata", None), AttentionMetadata):
        return metadata  # transformers has made our quantizer's config of it
    return AttentionMetadata.from_dict(stored) if AttentionMetadata.is_ours(stored) else None


def attention_modules(model: Any) -> dict[str, torch.nn.Module]:
    """The modules whose attention goes through AttentionInterface, by name."""
    if not model._can_set_attn_implementation():
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in ("is_causal", "layer_idx", "config"))
    }


def original(model: Any, module: Any) -> str:
    """The name of the attention implementation in force.

    Raises:
        ValueError: 4-bit attention is in force already (a submodel of a patched model, or a shared config).
    """
    name = model.config._attn_implementation
    if name == NAME:
        raise ValueError(
            "patch_model: this model's config already names 4-bit attention: it is part of a patched model, or shares its "
            "config object; patch the outer model, or build each model from a config of its own"
        )
    return name


def reason_to_skip(module: Any) -> str | None:
    """Why a module cannot have 4-bit attention although that is no mistake of the user's."""
    kind: Any = type(module)
    if not _asks_the_interface(kind):
        return f"its {kind.__name__} never calls {MECHANISM}"
    return None if module.is_causal else "not causal: only decoder self-attention is supported"


@lru_cache
def _asks_the_interface(kind: Any) -> bool:
    """Whether the code of a class of attention modules mentions the interface; some accept any name and go their own way."""
    return any("ALL_ATTENTION_FUNCTIONS" in function.__code__.co_names for function in _functions(kind))


def _functions(kind: type) -> Iterator[FunctionType]:
    """The methods of a class, and those of its bases that are in use: not overridden, or called through `super`."""
    for name, _ in inspect.getmembers(kind, inspect.isfunction):
        for base in kind.__mro__:
            if inspect.isfunction(method := vars(base).get(name)):
                yield (function := inspect.unwrap(method))
                if "super" not in function.__code__.co_names:
                    break


def problem(module: Any, spec: QuantSpec) -> str | None:
    """Why 4-bit attention cannot compute what this module asks for."""
    config = module.config
    found = {
        "a sliding window": getattr(module, "sliding_window", None) or _config_window(module),
        "a soft cap of the scores": getattr(config, "attn_logit_softcapping", None),
        "attention sinks": "s_aux" if getattr(module, "sinks", None) is not None else None,
        "a position bias": "position_bias" if getattr(module, "has_relative_attention_bias", None) is not None else None,
        "dropout": getattr(module, "attention_dropout", 0.0) or None,
    }
    for what, value in found.items():
        if value is not None:
            return f"{what} ({value})" + ("; set it to 0 in the config" if what == "dropout" else "")
    return head_dim_problem(getattr(module, "head_dim", None), spec)


def apply(model: Any, layers: list[AttentionLayer]) -> None:
    """Point the model at 4-bit attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, compact_mask)
    for layer in layers:
        setattr(model.get_submodule(layer.name), LAYER, layer)
    model.set_attn_implementation(NAME)


def switch(model: Any, layers: list[AttentionLayer]) -> None:
    """Nothing to do: `attention_forward` asks the layer at every call."""


def replaced(model: Any, layer: AttentionLayer) -> str | None:
    """The attention implementation that somebody set after the patch, or None."""
    name = model.config._attn_implementation
    return None if name == NAME else name


def restore(model: Any, layers: list[AttentionLayer]) -> None:
    """Undo `apply`, also a half-finished one."""
    for layer in layers:
        model.get_submodule(layer.name).__dict__.pop(LAYER, None)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(layers[0].original)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == METHOD:
        quantizer.remove_quantization_config(model)  # what is saved from now on is an ordinary model


def new_cache(model: Any, layers: list[AttentionLayer]) -> Any:
    """A transformers cache that keeps K and V of the patched layers in NVFP4.

    Raises:
        ValueError: V is not quantized, so there is nothing to pack.
    """
    from . import cache

    if any(layer.is_patched and layer.spec.pv != "nvfp4" for layer in layers):
        raise ValueError(
            "cache: V stays in BF16 with QuantSpec(pv='bf16'), which an FP4 cache cannot hold; generate with the default cache"
        )
    return cache.new_cache(model, {model.get_submodule(layer.name).layer_idx for layer in layers if layer.is_patched})


def _config_window(module: Any) -> int | None:
    """The sliding window of models that read it from the config in every layer (Mistral)."""
    config = module.config
    if getattr(config, "layer_types", None) is not None or getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)
