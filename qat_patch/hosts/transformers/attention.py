"""4-bit attention as transformers calls it. It is registered once and has no state; `AttentionLayer` has a module's settings.

Only modules that are patched come here, and what shares their config object without being known to the patch: that runs the
original attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from qat_kernels import attention
from qat_patch.layer import AttentionCall, AttentionLayer, under_autocast

from . import masks, packed_samples
from .source import host_function
from .windows import layer_kind, softcap_of, window_of

if TYPE_CHECKING:
    from .cache import Incoming

LAYER = "_qat_layer"
"""The attribute of an attention module that holds its `AttentionLayer`."""
CHECKED = "_qat_checked"
"""The attribute of patched modules, and of the models around them, that holds their shared `packed_samples.Checked`."""
COMPUTED = frozenset(
    {
        "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "position_ids",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
    }
)  # fmt: skip
"""Arguments of attention that 4-bit attention uses, or compares with what it computes."""
WITHOUT_EFFECT = frozenset(
    {
        # Arguments of a whole forward pass: models pass all their arguments on to their modules.
        "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "output_router_logits",
        "position_embeddings", "return_dict", "use_cache",
    }
)  # fmt: skip
"""Arguments that attention receives but that do not change it."""
KNOWN = COMPUTED | WITHOUT_EFFECT


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | Incoming,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    original: str = "sdpa",
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention interface: query [B, H, Lq, D], key and value [B, Hk, Lk, D] -> [B, Lq, H, D].

    Raises:
        ValueError: the call needs something that 4-bit attention does not compute.
    """
    layer: AttentionLayer | None = getattr(module, LAYER, None)
    if layer is None or not (layer.quantizes or layer.observer is not None):
        arguments = {"scaling": scaling, "dropout": dropout} | kwargs
        return original_attention(original, module, query, key, value, attention_mask, **arguments)
    getattr(module, CHECKED).check(query, attention_mask, kwargs)
    packing = packed_samples.packing(query, attention_mask, kwargs)
    refuse_unknown(layer, module, dropout, kwargs)
    if layer.probed and layer.observer is None:
        layer.note_call()
    try:
        if packing is None or masks.is_compact(attention_mask):
            from_the_first = window_of(module) is None and layer_kind(module) != "chunked_attention"
            causal = masks.read(attention_mask, query.shape[2], key.shape[2], from_the_first=from_the_first)
        else:  # the borders say everything; a mask is not needed
            causal = masks.Causal(key.shape[2], window=window_of(module))
        window = _window(causal.window, kwargs.get("sliding_window"), causal.filled, module)
    except ValueError as error:
        raise ValueError(f"4-bit attention ({layer.name}): {error}") from None
    features: dict[str, Any] = {"softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
    extras = features | {"window": None if causal.bounds else window, "bounds": causal.bounds}
    options: dict[str, Any] = {"spec": layer.spec, "scale": scaling, "impl": layer.impl, **layer.shifts_on(query.device)}
    if not isinstance(key, torch.Tensor):
        if packing is not None:
            raise ValueError(f"{layer.name}: expected no cache with packed samples, got an FP4 cache; pass use_cache=False")
        if causal.bounds is not None:
            raise ValueError(f"{layer.name}: an FP4 cache has no bounds; generate with the default cache")
        out = key.attention(query, **options, **features, window=window, key_mask=causal.key_mask)
        return out.transpose(1, 2).contiguous(), None
    if layer.observer is not None:
        arguments = {"scaling": scaling, "dropout": dropout} | kwargs
        out, weights = original_attention(original, module, query, key, value, attention_mask, **arguments)
        query, key, value = under_autocast(query, key[:, :, : causal.filled], value[:, :, : causal.filled])
        shown: dict[str, Any] = {"query": query, "key": key, "value": value, "out": out.transpose(1, 2)}
        call = AttentionCall(**shown, **extras, causal=causal.bounds is None, scale=scaling, key_mask=causal.key_mask)
        for each in [call] if packing is None else packed_samples.split(call, packing, attention_mask):
            layer.observer(layer, each)
        return out, weights
    if causal.filled < key.shape[2]:
        key, value = key[:, :, : causal.filled], value[:, :, : causal.filled]
    query, key, value = under_autocast(query, key, value)
    options |= {"causal": causal.bounds is None} | extras
    if packing is not None:
        q, k, v = (packed_samples.flatten(x) for x in (query, key, value))
        out = attention(q, k, v, **options, **packing)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None
    out = attention(query, key, value, **options, key_mask=causal.key_mask)
    return out.transpose(1, 2).contiguous(), None


def _window(window: int | None, asked: int | None, keys: int, module: torch.nn.Module) -> int | None:
    """The window of a mask, if it is the one that the module asks for. A window that holds all keys counts as none.

    Raises:
        ValueError: they do not agree.
    """
    if window is not None and asked is None and torch.compiler.is_compiling():
        # A mask with a window gives only the width there: it may also be one of chunks.
        if layer_kind(module) == "chunked_attention":
            if keys > window:
                raise ValueError(f"torch.compile cannot see chunks of {window} tokens; compile the blocks instead of the model")
            return None
        asked = window_of(module) or 0
    if asked is not None and asked != window and (window is not None or asked < keys):
        raise ValueError(f"the module asks for a sliding window of {asked} keys, and its mask has {window or 'none'}")
    return window


def original_attention(
    implementation: str, module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The original attention of this module, from our compact masks."""
    mask = masks.restore(mask, implementation, key.shape[2], query.dtype)
    return host_function(module, implementation)(module, query, key, value, mask, **kwargs)


def refuse_unknown(layer: AttentionLayer, module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise a ValueError if a call asks for something that 4-bit attention does not compute. None and False ask for nothing."""
    # The name is read only where it is needed: torch.compile of torch 2.11 compiles a graph for each name that it sees.
    features = {"softcap": softcap_of(module), "s_aux": getattr(module, "sinks", None)}
    for argument, asked in kwargs.items():
        if asked is None or asked is False:
            continue
        # Arguments that only pass through are left out: other modules' original attention does not get them.
        if argument in KNOWN and (argument not in features or features[argument] is not None):
            continue
        raise ValueError(
            f"4-bit attention ({layer.name}): {argument} is not supported: expected nothing for it, got {_short(asked)}; "
            "exclude this module from the patch, or use handle.disabled()"
        )
    is_causal = kwargs.get("is_causal")
    if not (module.is_causal if is_causal is None else is_causal):
        raise ValueError(f"4-bit attention ({layer.name}): is_causal=False is not supported; use handle.disabled()")
    if dropout:
        raise ValueError(f"4-bit attention ({layer.name}): attention dropout is not supported, got {dropout}; set it to 0")


def _short(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]
