"""Perturbed attention and its like: what listens for `scaled_dot_product_attention` hears of 4-bit attention by that name.

Hooks of diffusers (`layer_skip`), and code like them, put a TorchFunctionMode around an attention module and answer for
`torch.nn.functional.scaled_dot_product_attention`, or let it pass. In a patched module the call bears that name too, with queries
that bring along what is to run in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def listener() -> str | None:
    """The name of the innermost mode that hears of calls now; what moves new tensors to a default device is none."""
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
    """`attend(query, key, value)`, unless a mode answers in its place. Layouts as `scaled_dot_product_attention` has them.

    Raises:
        ValueError: a mode lets the call pass with another mask or scale than it came with.
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
    """Queries that know what attends to them."""

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
