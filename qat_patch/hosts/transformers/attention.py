"""4-bit attention as transformers calls it: the attention function and the mask function of its AttentionInterface.

Both are registered once under one name and hold no state; what a module does is in its `AttentionLayer`. Models that
merely share that name (through a shared config object) run the original attention.

The mask function keeps masks compact: a causal mask over the first n cached keys becomes a key mask [B, 1, 1, n], or None
when there is neither padding nor a cache longer than the tokens; packed samples are numbers, int32 [B, 1, 1, L]. Anything
else (sliding windows, custom masks) stays a full mask [B, 1, Lq, Lk], which 4-bit attention refuses and original attention
understands.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from qat_kernels import KVCache, attention
from qat_patch.layer import AttentionCall, AttentionLayer, under_autocast

from . import packed_samples

logger = logging.getLogger(__name__)

LAYER = "_qat_layer"
"""The attribute of an attention module that holds its `AttentionLayer`."""


class Incoming(NamedTuple):
    """What a layer of an FP4 cache passes on in place of keys, and of values: itself, and what is to be added to it."""

    cache: KVCache
    key: torch.Tensor
    value: torch.Tensor


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: query [B, H, Lq, D], key and value [B, Hk, Lk, D] -> [B, Lq, H, D]."""
    layer: AttentionLayer | None = getattr(module, LAYER, None)
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
