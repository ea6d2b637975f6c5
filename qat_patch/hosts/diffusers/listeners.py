"""Perturbed attention and similar code: if code intercepts `scaled_dot_product_attention`, it intercepts 4-bit attention too.

Hooks of diffusers (`layer_skip`) and similar code put a TorchFunctionMode around an attention module, and replace the result of
`torch.nn.functional.scaled_dot_product_attention` or let the call pass. A patched module makes a call of that name too; its
queries carry the attention that really runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def listener() -> str | None:
    """The name of the innermost active mode; the mode that moves new tensors to a default device does not count."""
    if not torch._C._len_torch_function_stack():
        return None
    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    return type(modes[-1]).__name__ if modes else None


def heard(
    attend: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """`attend(query, key, value)`, unless a mode replaces its result. Layouts are those of `scaled_dot_product_attention`.

    Raises:
        ValueError: a mode changes the mask or scale of the call.
    """
    options: dict[str, Any] = {
        "attn_mask": mask,
        "is_causal": causal,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    heard_query: Any = query.as_subclass(_HeardQuery)
    heard_query.attend, heard_query.options = attend, options
    out = scaled_dot_product_attention(query=heard_query, key=key, value=value, **options)
    return out.as_subclass(torch.Tensor)


class _HeardQuery(torch.Tensor):
    """Queries that carry the attention to run."""

    attend: Callable[..., torch.Tensor]
    options: dict[str, Any]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return super().__torch_function__(func, types, args, kwargs or {})
        given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        if any(given.get(name) is not option for name, option in query.options.items()):
            raise ValueError(
                "4-bit attention: scaled_dot_product_attention: expected its mask, is_causal and scale to pass through a "
                "TorchFunctionMode as they came, got others; exclude this module from the patch"
            )
        return query.attend(*(x.as_subclass(torch.Tensor) for x in (query, key, value)))
