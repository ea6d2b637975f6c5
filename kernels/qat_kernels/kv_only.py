"""Attention that quantizes only K and V: these are fake-quantized, and PyTorch's own attention does the rest.

Values of NVFP4 are exact in 16 bits, so SDPA, FlashAttention and cuDNN compute with them what a server computes with its cache
(docs/NUMERICS.md, section 9), and training costs what BF16 costs. The gradient goes straight through the rounding.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from . import ran
from .derivatives import refuse_second_derivative
from .dispatch import training_kernels, why_not
from .nvfp4 import in_format
from .spec import NVFP4, QuantSpec
from .varlen import Packing

_VARLEN_TAKES = inspect.signature(varlen_attn).parameters
"""The arguments of this torch: 2.11 has `is_causal` and no grouped heads."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    packing: Packing | None,
    *,
    spec: QuantSpec,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    """O in the shape of `q`, differentiable. Arguments as `qat_kernels.attention` has checked them."""
    q, k, v = _FakeQuantize.apply(q, k, v, key_mask, spec.to_json())
    # Autocast would round what is quantized in float32 once more, and give O another dtype than Q's.
    with torch.autocast(q.device.type, enabled=False):
        return _attend(q, k, v, key_mask, packing, causal, scale)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    packing: Packing | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    # Where sizes are symbolic, only this form makes a bool of a comparison.
    gqa = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    if packing is not None:
        options: dict[str, Any] = {"is_causal": causal}
        if "window_size" in _VARLEN_TAKES:
            options = {"window_size": (-1, 0) if causal else (-1, -1)}
        if "enable_gqa" in _VARLEN_TAKES:
            options["enable_gqa"] = gqa
        elif gqa:
            k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
        out = varlen_attn(q, k, v, *packing, scale=scale, **options)
        assert isinstance(out, torch.Tensor), "no log-sum-exp was asked for"
        return out
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    mask = None if key_mask is None else key_mask[:, None, None]
    if causal and seqlen_q > 1 and (mask is not None or seqlen_q != seqlen_k):  # SDPA's own causal mask is for equal lengths
        past = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).tril(seqlen_k - seqlen_q)
        mask = past if mask is None else mask & past
    if mask is not None and gqa:  # with a mask, only the kernel that holds all scores in memory takes grouped heads
        k, v = _for_each_query_head(k, q), _for_each_query_head(v, q)
    if mask is None:
        is_causal = True if causal and seqlen_q > 1 else False  # noqa: SIM210
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=gqa)
    # What SDPA makes of a row without a key depends on its kernel: such rows see all keys, and are zeros in the end.
    blind = ~mask.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, mask | blind, scale=scale).masked_fill(blind, 0.0)


def _for_each_query_head(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """K or V [B, Hk, ...] or [total, Hk, D] with its heads repeated, as many as Q has."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


class _FakeQuantize(torch.autograd.Function):
    """Q, and K and V as the spec has them, zero where excluded. The gradient passes through unchanged, and has no derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, spec: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q.view_as(q), *fake_quantize_kv(k, v, key_mask, spec)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            refuse_second_derivative("the gradient of a derivative")
        return *grads, None, None


@torch.library.custom_op("qat_kernels::fake_quantize_kv", mutates_args=())
def fake_quantize_kv(
    k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V in the formats of `spec`, in their dtype, contiguous; zero where `key_mask` excludes them, also NaN."""
    ran.note("sdpa")
    formats = QuantSpec.from_json(spec).formats
    if k.device.type == "cuda" and why_not("triton", k.device, k.dtype, NVFP4, False) is None:
        return training_kernels().fake_quantize_kv(k, v, key_mask, formats)
    if key_mask is not None:
        where = key_mask[:, None, :, None]
        k, v = (torch.where(where, x, 0.0) for x in (k, v))
    quantized = (in_format(x, how).to(x.dtype).contiguous() for x, how in ((k, formats.key), (v, formats.value)))
    return next(quantized), next(quantized)


@fake_quantize_kv.register_fake
def _(k: torch.Tensor, v: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)
