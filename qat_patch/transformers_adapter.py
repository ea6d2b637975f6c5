"""Transformers: 4-bit attention through AttentionInterface, with a mask function of its own.

Both are registered once under one name and hold no state; what a module does is in its `AttentionLayer`. Models that
merely share that name (through a shared config object) run the original attention.

The mask function keeps masks compact: a causal mask over the first n cached keys becomes a key mask [B, 1, 1, n], or None
when there is neither padding nor a cache longer than the tokens; packed samples are numbers, int32 [B, 1, 1, L]. Anything
else (sliding windows, custom masks) stays a full mask [B, 1, Lq, Lk], which 4-bit attention refuses and original attention
understands.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from types import FunctionType
from typing import Any, NamedTuple

import torch

from qat_kernels import KVCache, QuantSpec, attention

from . import packed_samples
from .block import CONFIG_KEYS, METHOD, AttentionBlock
from .config import head_dim_problem
from .layer import AttentionCall, AttentionLayer, under_autocast

logger = logging.getLogger(__name__)

MECHANISM = "transformers' AttentionInterface"
NAME = "qat_fp4"
"""The name of 4-bit attention among transformers' attention implementations."""
_LAYER = "_qat_layer"


class Incoming(NamedTuple):
    """What a layer of an FP4 cache passes on in place of keys, and of values: itself, and what is to be added to it."""

    cache: KVCache
    key: torch.Tensor
    value: torch.Tensor


def owns(model: object) -> bool:
    """Whether this is a model of transformers; does not import it."""
    return any(cls.__name__ == "PreTrainedModel" and cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


def stored_block(model: torch.nn.Module) -> AttentionBlock | None:
    """The block that an export of this package left in the model's config."""
    block = getattr(model.config, CONFIG_KEYS["transformers"], None)
    block = block.to_dict() if hasattr(block, "to_dict") else block
    return AttentionBlock.from_dict(block) if AttentionBlock.is_ours(block) else None


def attention_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules whose attention goes through AttentionInterface, by name."""
    if not model._can_set_attn_implementation():
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if all(hasattr(module, attribute) for attribute in ("is_causal", "layer_idx", "config"))
    }


def original(model: torch.nn.Module, module: torch.nn.Module) -> str:
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


def reason_to_skip(module: torch.nn.Module) -> str | None:
    """Why a module cannot have 4-bit attention although that is no mistake of the user's."""
    if not _asks_the_interface(type(module)):
        return f"its {type(module).__name__} never calls {MECHANISM}"
    return None if module.is_causal else "not causal: only decoder self-attention is supported"


@lru_cache
def _asks_the_interface(kind: type) -> bool:
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


def problem(module: torch.nn.Module, spec: QuantSpec) -> str | None:
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


def apply(model: torch.nn.Module, layers: list[AttentionLayer]) -> None:
    """Point the model at 4-bit attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, compact_mask)
    for layer in layers:
        setattr(model.get_submodule(layer.name), _LAYER, layer)
    model.set_attn_implementation(NAME)


def switch(model: torch.nn.Module, layers: list[AttentionLayer]) -> None:
    """Nothing to do: `attention_forward` asks the layer at every call."""


def replaced(model: torch.nn.Module, layer: AttentionLayer) -> str | None:
    """The attention implementation that somebody set after the patch, or None."""
    name = model.config._attn_implementation
    return None if name == NAME else name


def restore(model: torch.nn.Module, layers: list[AttentionLayer]) -> None:
    """Undo `apply`, also a half-finished one."""
    for layer in layers:
        model.get_submodule(layer.name).__dict__.pop(_LAYER, None)
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation(layers[0].original)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == METHOD:
        quantizer.remove_quantization_config(model)  # what is saved from now on is an ordinary model


def new_cache(model: torch.nn.Module, layers: list[AttentionLayer]) -> Any:
    """A transformers cache that keeps K and V of the patched layers in NVFP4.

    Raises:
        ValueError: V is not quantized, so there is nothing to pack.
    """
    from . import cache

    if any(layer.spec is not None and layer.spec.pv != "nvfp4" for layer in layers):
        raise ValueError(
            "cache: V stays in BF16 with QuantSpec(pv='bf16'), which an FP4 cache cannot hold; generate with the default cache"
        )
    return cache.new_cache(model, {model.get_submodule(layer.name).layer_idx for layer in layers if layer.spec is not None})


def compact_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask interface: None (plain causal), bool [B, 1, 1, n] (causal over n keys), samples, or a full mask."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    samples = packed_samples.compact(mask_function, causal_mask_function)
    if samples is not None:
        return samples
    if mask_function is not causal_mask_function or kwargs.get("local_size") is not None or kv_offset:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask=attention_mask, **kwargs
        )
    filled = int(q_offset) + q_length
    if attention_mask is not None:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, max(0, filled - attention_mask.shape[1])))[:, :filled]
        if not torch.compiler.is_compiling() and attention_mask.all():
            attention_mask = None
    if attention_mask is None:
        if filled == (kv_length if q_length == 1 else q_length):
            return None
        attention_mask = torch.ones(batch_size, filled, dtype=torch.bool, device=kwargs.get("device"))
    return attention_mask.bool()[:, None, None]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: query [B, H, Lq, D], key and value [B, Hk, Lk, D] -> [B, Lq, H, D]."""
    layer: AttentionLayer | None = getattr(module, _LAYER, None)
    if layer is not None and layer.enabled and module.layer_idx == 0:
        packed_samples.check(query, attention_mask, kwargs)
    original = layer.original if layer is not None else "sdpa"
    arguments = {"scaling": scaling, "dropout": dropout} | kwargs
    if isinstance(key, Incoming) and (layer is None or not layer.quantizes):
        raise ValueError(
            f"{layer.name if layer else type(module).__name__}: its keys and values are in an FP4 cache, which original "
            "attention cannot read; inside handle.disabled() generate with the default cache"
        )
    if layer is None or not (layer.quantizes or layer.observer is not None):
        return _original_attention(original, module, query, key, value, attention_mask, **arguments)
    packing, original_mask = packed_samples.packing(query, attention_mask, kwargs), attention_mask
    if packing is not None:
        attention_mask = None
    _refuse_unsupported(layer.name, query, attention_mask, dropout, kwargs)
    if isinstance(key, Incoming):
        if packing is not None:
            raise ValueError(f"{layer.name}: expected no cache with packed samples, got an FP4 cache; pass use_cache=False")
        key_mask = None if attention_mask is None else attention_mask[:, 0, 0]
        options = {"spec": layer.spec, "scale": scaling, "key_mask": key_mask, "k_shift": layer.shift_on(query.device)}
        out = key.cache.attention(*under_autocast(query, key.key, key.value), **options)
        return out.transpose(1, 2).contiguous(), None
    if attention_mask is None:
        # A prefill sees None and a static cache whose slots behind the tokens are still empty.
        filled, key_mask = key.shape[2] if query.shape[2] == 1 else query.shape[2], None
    else:
        filled, key_mask = attention_mask.shape[3], attention_mask[:, 0, 0]
    if layer.observer is not None:
        out, weights = _original_attention(original, module, query, key, value, original_mask, **arguments)
        query, key, value = under_autocast(query, key[:, :, :filled], value[:, :, :filled])
        shown = {"query": query, "key": key, "value": value, "out": out.transpose(1, 2)}
        call = AttentionCall(**shown, causal=True, scale=scaling, key_mask=key_mask)
        for each in [call] if packing is None else packed_samples.split(call, packing):
            layer.observer(layer, each)
        return out, weights
    query, key, value = under_autocast(query, key[:, :, :filled], value[:, :, :filled])
    attend = partial(attention, spec=layer.spec, causal=True, scale=scaling, k_shift=layer.shift_on(key.device))
    if packing is not None:
        out = attend(*(packed_samples.flatten(x) for x in (query, key, value)), **packing)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None
    out = attend(query, key, value, key_mask=key_mask)
    return out.transpose(1, 2).contiguous(), None


def _original_attention(
    implementation: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention that ran here before the patch, given the masks of ours."""
    from transformers import AttentionInterface

    length, keys = query.shape[2], key.shape[2]
    if packed_samples.is_compact(mask):
        mask = packed_samples.expand(mask)
    if mask is not None and mask.shape[2] != length:
        mask = mask & _causal(length, mask.shape[3], query.device)
    if mask is not None and mask.shape[3] < keys:
        mask = torch.nn.functional.pad(mask, (0, keys - mask.shape[3]))
    if implementation != "eager":
        if implementation != "sdpa":
            _log_sdpa(implementation)
        return AttentionInterface()["sdpa"](module, query, key, value, mask, **kwargs)
    if mask is None and length > 1:
        mask = _causal(length, length, query.device)
        mask = torch.nn.functional.pad(mask, (0, keys - length))
    if mask is not None:
        lowest = torch.finfo(query.dtype).min
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), lowest)
    return sys.modules[type(module).__module__].eager_attention_forward(module, query, key, value, mask, **kwargs)


def _causal(length: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [1, 1, length, keys]: the last query sees every key."""
    rows = torch.arange(keys - length, keys, device=device)
    return (torch.arange(keys, device=device) <= rows[:, None])[None, None]


@lru_cache
def _log_sdpa(implementation: str) -> None:
    logger.warning("qat_patch: where a model loaded with %s keeps its original attention, sdpa computes it.", implementation)


def _refuse_unsupported(
    name: str, query: torch.Tensor, mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    for argument in ("softcap", "s_aux", "position_bias", "sliding_window", "cache"):
        if kwargs.get(argument) is not None:
            raise ValueError(f"4-bit attention ({name}): {argument} is not supported; exclude this module from the patch")
    if dropout:
        raise ValueError(f"4-bit attention ({name}): attention dropout is not supported, got {dropout}; set it to 0")
    if kwargs.get("output_attentions"):
        raise ValueError(f"4-bit attention ({name}): output_attentions=True is not supported; use handle.disabled()")
    if mask is not None and (mask.dtype != torch.bool or (mask.shape[2] != 1 and query.shape[2] > 1)):
        raise ValueError(
            f"4-bit attention ({name}): unsupported mask {mask.dtype} {tuple(mask.shape)}: expected causal attention with an "
            "optional padding mask [batch, keys], or packed samples; sliding windows and custom 4D masks are not supported yet "
            "(inside torch.compile pass attention_mask, or cu_seq_lens_q and what goes with it if samples are packed: "
            "transformers cannot look at position_ids there, and masks as if they were)"
        )


def _config_window(module: torch.nn.Module) -> int | None:
    """The sliding window of models that read it from the config in every layer (Mistral)."""
    config = module.config
    if getattr(config, "layer_types", None) is not None or getattr(config, "use_sliding_window", True) is False:
        return None
    return getattr(config, "sliding_window", None)
