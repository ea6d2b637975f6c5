"""Sliding windows in transformers: which modules have one, and caches that keep enough keys before it for 4-bit attention.

A cache with a window drops keys that no query will see. 4-bit attention needs a few more, because a scale of V is shared by 16
tokens: it needs the whole group in which the window begins, and groups count from the first token (`masks.BEFORE_A_WINDOW`).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .masks import BEFORE_A_WINDOW

WINDOWS = "_qat_windows"
"""The attribute of a model directly around patched modules that holds their windows."""
KIND = "_qat_layer_kind"
"""The attribute of a patched module that holds what `layer_kind` found."""
_KEEPS_MORE = "_qat_keeps_more"
"""The attribute of a layer of a cache that says so."""


def head_dims_of(module: Any) -> tuple[int | None, int | None]:
    """Of queries and keys, and of values, as far as the module tells; values of the same where it says nothing of them."""
    head_dim = getattr(module, "qk_head_dim", getattr(module, "head_dim", None))
    return head_dim, getattr(module, "v_head_dim", head_dim)


def window_of(module: Any) -> int | None:
    """How many keys a query of this module sees, including its own, as far as module and config say."""
    config, own = module.config, getattr(module, "sliding_window", None)
    if own is not None:
        return own
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # every layer reads it from the config (Mistral)
        return None if getattr(config, "use_sliding_window", True) is False else getattr(config, "sliding_window", None)
    return getattr(config, "sliding_window", None) if layer_kind(module) == "sliding_attention" else None


def softcap_of(module: Any) -> float | None:
    """The soft cap of the scores that the config asks for (Gemma 2)."""
    return getattr(module.config, "attn_logit_softcapping", None)


def layer_kind(module: Any) -> str | None:
    """The config's name for the attention of this layer.

    Patched modules carry it. A block that reads its own number is compiled for that number alone, and torch.compile gives up
    after eight of them.
    """
    if hasattr(module, KIND):
        return getattr(module, KIND)
    kinds, number = getattr(module.config, "layer_types", None) or [], getattr(module, "layer_idx", None)
    return kinds[number] if number is not None and number < len(kinds) else None


def prepare_cache(module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a model directly around patched modules, with a cache that keeps enough keys before a window.

    Raises:
        ValueError: the cache has already dropped tokens.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicSlidingWindowLayer

    cache = next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)
    if cache is None:
        uses = kwargs.get("use_cache")
        uses = getattr(module.config, "use_cache", False) if uses is None else uses
        if not uses or module.training or getattr(module.config, "is_encoder_decoder", False):
            return kwargs
        cache = DynamicCache(config=module.config)  # as the model itself would make it
        name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"
        kwargs = kwargs | {name: cache}
    windows = getattr(module, WINDOWS)
    # All layers with such a window: transformers makes one mask for them, of the length of the first one's keys.
    for layer in getattr(cache, "layers", ()):
        if type(layer) is not DynamicSlidingWindowLayer or layer.sliding_window not in windows or hasattr(layer, _KEEPS_MORE):
            continue
        if layer.get_seq_length() >= layer.sliding_window:
            raise ValueError(
                "4-bit attention: this cache has dropped tokens before a sliding window, in passes without 4-bit attention; "
                "expected a new cache, or one that 4-bit attention has seen from its first token on"
            )
        layer.sliding_window += BEFORE_A_WINDOW
        layer._sliding_window_tensor = torch.tensor(layer.sliding_window, device=layer._sliding_window_tensor.device)
        setattr(layer, _KEEPS_MORE, True)
    return kwargs
