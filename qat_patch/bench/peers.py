"""Other implementations that are timed beside ours: PyTorch, FlashAttention, SageAttention and FlashInfer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qat_patch.bench.shapes import Shape, inputs, packing

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def peers(shape: Shape, device: str) -> dict[str, Attention]:
    """Other implementations by name. Those that cannot run the shape on this device are left out, with a message."""
    if device == "cpu":
        return {} if shape.packed or shape.masking else {"sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION, shape)}
    if shape.packed:
        found = {"varlen_attn": varlen(shape, device)}
    elif shape.masking:
        return {"varlen_attn": windowed(shape, device)} if shape.block_size == 1 and shape.batch == 1 else {}
    else:
        found = {"sdpa flash": sdpa(SDPBackend.FLASH_ATTENTION, shape), "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, shape)}
        found["sdpa"] = sdpa(None, shape)
        found |= installed(shape)
    small = shape if shape.packed else shape._replace(queries=64, keys=64)
    for name, peer in list(found.items()):
        try:
            peer(*(x.detach() for x in inputs(small, device, torch.bfloat16)[:3]))
        except (RuntimeError, ImportError, TypeError, ValueError, AssertionError) as error:
            print(f"  {name}: left out: {(str(error).splitlines() or [type(error).__name__])[0]}")
            del found[name]
    return found


def sdpa(backend: SDPBackend | None, shape: Shape) -> Attention:
    """PyTorch's attention with this backend; None: PyTorch chooses."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend) if backend is not None else nullcontext():
            return scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=shape.heads != shape.key_heads)

    return call


def windowed(shape: Shape, device: str) -> Attention:
    """PyTorch's FlashAttention-2 with a window: `varlen` with one document."""
    attend = varlen(shape, device, [shape.queries])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return attend(*(x[0].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)[None]

    return call


def varlen(shape: Shape, device: str, lengths: list[int] | None = None) -> Attention:
    """PyTorch's FlashAttention-2 for packed sequences. Newer versions take a window instead of `is_causal`."""
    documents = packing(lengths or shape.documents(), device)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        options: dict[str, Any] = (
            {"window_size": (shape.window - 1, 0 if shape.causal else -1)}
            if "window_size" in known
            else {"is_causal": shape.causal}
        )
        if shape.heads != shape.key_heads and "enable_gqa" in known:
            options["enable_gqa"] = True
        elif shape.heads != shape.key_heads:
            k, v = (x.repeat_interleave(shape.heads // shape.key_heads, 1) for x in (k, v))
        bounds, longest = documents["cu_seqlens_q"], documents["max_seqlen_q"]
        result: Any = varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)
        return result

    return call


def flash_attention(function: Callable[..., Any], shape: Shape) -> Attention:
    """A function of a FlashAttention package. These take [B, L, H, D]; some also return the log-sum-exp."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=shape.causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def installed(shape: Shape) -> dict[str, Attention]:
    """Attention from other packages that are installed."""
    found: dict[str, Attention] = {}
    with suppress(ImportError):
        from flash_attn import flash_attn_func

        found["flash_attn"] = flash_attention(flash_attn_func, shape)
    with suppress(ImportError):
        from flash_attn_interface import flash_attn_func as flash_attn_3

        found["flash_attn 3"] = flash_attention(flash_attn_3, shape)
    with suppress(ImportError):
        from flash_attn.cute import flash_attn_func as flash_attn_cute

        found["flash_attn cute"] = flash_attention(flash_attn_cute, shape)
    if shape.forward_only and shape.heads == shape.key_heads:
        found |= forward_only(shape)
    return found


def forward_only(shape: Shape) -> dict[str, Attention]:
    """Packages without a backward. They do not support grouped heads."""
    found: dict[str, Attention] = {}
    with suppress(ImportError):
        from sageattn3 import sageattn3_blackwell

        # It subtracts the mean of K in place.
        found["sageattention3"] = lambda q, k, v: sageattn3_blackwell(q, k.clone(), v, is_causal=shape.causal)
    with suppress(ImportError):
        from sageattention import sageattn

        found["sageattention"] = lambda q, k, v: sageattn(q, k, v, is_causal=shape.causal)
    try:
        import flashinfer
    except ImportError:
        return found

    def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        options = {"causal": shape.causal, "kv_layout": "HND"}
        each = [
            flashinfer.single_prefill_with_kv_cache(a.mT.mT.transpose(0, 1), b, c, **options)
            for a, b, c in zip(q, k, v, strict=True)
        ]
        return torch.stack(each).transpose(1, 2)

    found["flashinfer"] = one_by_one
    return found
