"""4-bit attention as transformers calls it. Registered once, it holds no state; what a module does is in its `AttentionLayer`.

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

if TYPE_CHECKING:
    from .cache import Incoming

LAYER = "_qat_layer"
"""The attribute of an attention module that holds its `AttentionLayer`."""
CHECKED = "_qat_checked"
"""The attribute of patched modules, and of the models around them, that holds the `packed_samples.Checked` that they share."""
COMPUTED = frozenset({"scaling", "is_causal", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"})
"""Arguments of attention that 4-bit attention computes, or compares with what it computes."""
WITHOUT_EFFECT = frozenset(
    {
        # Of a whole forward pass; models hand all that they get on to their modules.
        "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_hidden_states", "output_router_logits",
        "position_embeddings", "return_dict", "use_cache",
    }
)  # fmt: skip
"""Arguments that attention receives and that change nothing about it."""
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
        ValueError: the call asks for something that 4-bit attention does not compute.
    """
    layer: AttentionLayer | None = getattr(module, LAYER, None)
    if layer is None or not (layer.quantizes or layer.observer is not None):
        arguments = {"scaling": scaling, "dropout": dropout} | kwargs
        return original_attention(original, module, query, key, value, attention_mask, **arguments)
    getattr(module, CHECKED).check(query, attention_mask, kwargs)
    packing = packed_samples.packing(query, attention_mask, kwargs)
    refuse_unknown(layer.name, module, dropout, kwargs)
    if layer.probed and layer.observer is None:
        layer.note_call()
    if packing is None:
        try:
            causal = masks.read(attention_mask, query.shape[2], key.shape[2])
        except ValueError as error:
            raise ValueError(f"4-bit attention ({layer.name}): {error}") from None
    elif not isinstance(key, torch.Tensor):
        raise ValueError(f"{layer.name}: expected no cache with packed samples, got an FP4 cache; pass use_cache=False")
    else:
        causal = masks.Causal(key.shape[2], None, None)
    if not isinstance(key, torch.Tensor):
        shift = layer.shift_on(query.device)
        out = key.attention(query, spec=layer.spec, scale=scaling, key_mask=causal.key_mask, k_shift=shift, impl=layer.impl)
        return out.transpose(1, 2).contiguous(), None
    if layer.observer is not None:
        arguments = {"scaling": scaling, "dropout": dropout} | kwargs
        out, weights = original_attention(original, module, query, key, value, attention_mask, **arguments)
        query, key, value = under_autocast(query, key[:, :, : causal.filled], value[:, :, : causal.filled])
        shown = {"query": query, "key": key, "value": value, "out": out.transpose(1, 2)}
        call = AttentionCall(**shown, causal=True, scale=scaling, key_mask=causal.key_mask)
        for each in [call] if packing is None else packed_samples.split(call, packing):
            layer.observer(layer, each)
        return out, weights
    if causal.filled < key.shape[2]:
        key, value = key[:, :, : causal.filled], value[:, :, : causal.filled]
    query, key, value = under_autocast(query, key, value)
    options: dict[str, Any] = {"spec": layer.spec, "causal": True, "scale": scaling, "impl": layer.impl}
    options["k_shift"] = layer.shift_on(key.device)
    if packing is not None:
        q, k, v = (packed_samples.flatten(x) for x in (query, key, value))
        out = attention(q, k, v, **options, **packing)
        return out.unflatten(0, (query.shape[0], query.shape[2])), None
    out = attention(query, key, value, **options, key_mask=causal.key_mask)
    return out.transpose(1, 2).contiguous(), None


def original_attention(
    implementation: str, module: torch.nn.Module, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What this module computes without the patch, from the masks of ours."""
    mask = masks.restore(mask, implementation, key.shape[2], query.dtype)
    return host_function(module, implementation)(module, query, key, value, mask, **kwargs)


def refuse_unknown(name: str, module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    """That a call asks for nothing but what 4-bit attention computes. None and False ask for nothing."""
    for argument, asked in kwargs.items():
        if asked is None or asked is False or argument in KNOWN:
            continue
        raise ValueError(
            f"4-bit attention ({name}): {argument} is not supported: expected nothing for it, got {_short(asked)}; exclude this "
            "module from the patch, or use handle.disabled()"
        )
    is_causal = kwargs.get("is_causal")
    if not (module.is_causal if is_causal is None else is_causal):
        raise ValueError(f"4-bit attention ({name}): is_causal=False is not supported; use handle.disabled()")
    if dropout:
        raise ValueError(f"4-bit attention ({name}): attention dropout is not supported, got {dropout}; set it to 0")


def _short(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)[:60]
