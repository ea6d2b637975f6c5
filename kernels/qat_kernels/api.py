"""The public attention: validate, resolve, call. One custom op with one autograd rule; docs/NUMERICS.md has the formulas."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch

from . import reference, varlen
from .arguments import Impl, PackingArguments, validate
from .dispatch import fp4_kernels, resolve, training_kernels
from .spec import NVFP4, QuantSpec, reads_value
from .varlen import Packing


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = ...,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: torch.Tensor | None = ...,
    k_shift: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[False] = ...,
    impl: Impl = ...,
) -> torch.Tensor: ...


@overload
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = ...,
    causal: bool = ...,
    scale: float | None = ...,
    key_mask: torch.Tensor | None = ...,
    k_shift: torch.Tensor | None = ...,
    cu_seqlens_q: torch.Tensor | None = ...,
    cu_seqlens_k: torch.Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    return_lse: Literal[True],
    impl: Impl = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    spec: QuantSpec = NVFP4,
    causal: bool = False,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    k_shift: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """4-bit attention with the straight-through gradient of docs/NUMERICS.md.

    Args:
        q: queries [B, H, Lq, D], or packed [total_q, H, D]; D a multiple of 16 up to 256; float32, float16, bfloat16 (float64
            for tests). Any strides: transposed views are fine and cost no copy.
        k, v: keys and values [B, Hk, Lk, D], or packed [total_k, Hk, D], of the same dtype and device; H is a multiple of Hk
            (grouped-query attention: query head h reads key head h // (H / Hk)).
        spec: what is quantized, and how.
        causal: query i may see key j if j <= i + (Lk - Lq). The query's own group of 16 keys and the first group of the
            sequence stay in high precision (section 4), which makes the result strictly causal.
        scale: factor of the scores; default D ** -0.5.
        key_mask: bool [B, Lk], True where a key may be seen. Excluded keys and values are never computed with, whatever
            they hold. Groups along tokens are counted from the first allowed key. Not with packed sequences: pack the allowed
            tokens alone.
        k_shift: float32 [Hk, D], subtracted from the keys before quantization; does not change the exact scores.
        cu_seqlens_q, cu_seqlens_k: packed sequences, in the convention of FlashAttention's varlen functions: int32
            [documents + 1] on the device of `q`, starting at 0, never decreasing and ending at total_q (total_k). Document n
            is the tokens from entry n to entry n + 1, and may be empty. Its queries see its keys, and the result is that
            of the document alone: Lq and Lk above, groups of 16 along tokens and kept groups are those of each document.
        max_seqlen_q, max_seqlen_k: with packed sequences, the length of the longest document (or more).
        return_lse: also return the log-sum-exp of the true scores, not differentiable.
        impl: `eager` is PyTorch on any device; `triton` is the fused kernels, for NVIDIA GPUs from sm_80 on and all dtypes but
            float64; their matrix products take bfloat16 operands, which is exact for what is quantized, and sum in float32.
            `fp4` is the kernel for FP4 units, without a gradient, which other GPUs from sm_80 on emulate. `auto` takes `triton`
            where it can run, and `eager` elsewhere. `explain` says what runs, and why.

    Returns:
        The output in the shape, dtype and stride order of `q`; with `return_lse` also float32 [B, H, Lq] (float64 for
        float64 inputs), packed [H, total_q] as FlashAttention's varlen functions return it: the rows of a head lie together in
        both layouts, so that one head stride addresses them. Rows that may see no key are 0, their log-sum-exp is -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run here; the message says what was expected. The
            values of `cu_seqlens` are checked where they are read, which is in `eager`, on any device. A kernel on a GPU never
            brings them to the host, because that would wait for all work queued before; there, wrong values are not noticed.
    """
    arguments = PackingArguments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    packed = arguments if any(x is not None for x in arguments) else None
    packing = validate(q, k, v, spec, key_mask, k_shift, packed, impl)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if impl == "auto":
        impl = resolve(q.device, q.dtype)
    elif impl == "fp4" and needs_gradient:
        raise ValueError("attention: impl='fp4' has no gradient; call it under torch.no_grad(), or use impl='triton'")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = (spec.to_json(), causal, scale, needs_gradient, impl)
    out, _, lse, *_ = _attention_forward(q, k, v, key_mask, k_shift, *options, *(() if packing is None else packing))
    return (out, lse.detach()) if return_lse else out


@torch.library.custom_op("qat_kernels::attention_forward", mutates_args=())
def _attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    spec: str,
    causal: bool,
    scale: float,
    needs_gradient: bool,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """O, O' (empty where O serves, or no gradient is needed), LSE, and what the backward of `triton` reads beside them."""
    spec_ = QuantSpec.from_json(spec)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if impl == "triton":
        forward = training_kernels().forward
        return tuple(
            forward(q, k, v, key_mask, k_shift, packing, with_gradient=needs_gradient, spec=spec_, causal=causal, scale=scale)
        )
    nothing = q.new_empty(0, dtype=torch.uint8)
    if impl == "fp4":
        out, lse = fp4_kernels().forward(q, k, v, key_mask, k_shift, packing, spec=spec_, causal=causal, scale=scale)
        return out, q.new_empty(0), lse, lse.new_empty(0), nothing
    with_out_hp = _has_out_hp(spec_, needs_gradient)
    with torch.autocast(q.device.type, enabled=False):  # the matrix products of the reference are float32 by definition
        if packing is None:
            out, out_hp, lse = reference.forward(
                q, k, v, key_mask, k_shift, spec=spec_, causal=causal, scale=scale, with_out_hp=with_out_hp
            )
        else:
            out, out_hp, lse = varlen.forward(
                q, k, v, k_shift, packing, spec=spec_, causal=causal, scale=scale, with_out_hp=with_out_hp
            )
    return out, out_hp, lse, lse.new_empty(0), nothing


@_attention_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    spec: str,
    causal: bool,
    scale: float,
    needs_gradient: bool,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    spec_, packing = QuantSpec.from_json(spec), _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out_hp = torch.empty_like(q) if _has_out_hp(spec_, needs_gradient) else q.new_empty(0)
    lse = q.new_empty(varlen.lse_shape(q.shape, packing), dtype=reference.accumulator(q.dtype))
    stats_shape = codes_shape = (0,)
    if impl == "triton":
        stats_shape, codes_shape = training_kernels().output_shapes(
            q.shape, k.shape, packing, spec=spec_, causal=causal, with_gradient=needs_gradient
        )
    return torch.empty_like(q), out_hp, lse, lse.new_empty(stats_shape), q.new_empty(codes_shape, dtype=torch.uint8)


@torch.library.custom_op("qat_kernels::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out_hp: torch.Tensor,
    stats: torch.Tensor,
    codes: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    keys: int,
    num_heads_k: int,
    spec: str,
    causal: bool,
    scale: float,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV. `triton` takes `stats` and `codes` of its forward in place of Q and K, and V only where it is read again."""
    spec_ = QuantSpec.from_json(spec)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if impl == "triton":
        shape = _key_shape(grad_out, keys, num_heads_k)
        backward = training_kernels().backward
        return backward(
            grad_out, v, out_hp, stats, codes, key_mask, packing, key_shape=shape, spec=spec_, causal=causal, scale=scale
        )
    assert q is not None and k is not None and v is not None, "eager reads its inputs again"
    with torch.autocast(grad_out.device.type, enabled=False):
        if packing is None:
            return reference.backward(grad_out, q, k, v, out_hp, key_mask, k_shift, spec=spec_, causal=causal, scale=scale)
        return varlen.backward(grad_out, q, k, v, out_hp, k_shift, packing, spec=spec_, causal=causal, scale=scale)


@_attention_backward.register_fake
def _(
    grad_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out_hp: torch.Tensor,
    stats: torch.Tensor,
    codes: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    keys: int,
    num_heads_k: int,
    *_: object,
    **__: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _key_shape(grad_out, keys, num_heads_k)
    return grad_out.new_empty(grad_out.shape), grad_out.new_empty(shape), grad_out.new_empty(shape)


def _key_shape(grad_out: torch.Tensor, keys: int, num_heads_k: int) -> torch.Size:
    """Of K and V: [B, Hk, Lk, D], or [total, Hk, D] of packed sequences."""
    head_dim = grad_out.shape[-1]
    return torch.Size((grad_out.shape[0], num_heads_k, keys, head_dim) if grad_out.ndim == 4 else (keys, num_heads_k, head_dim))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, key_mask, k_shift, ctx.spec, ctx.causal, ctx.scale, needs_gradient, ctx.impl, *packing = inputs
    cu_seqlens, ctx.max_seqlens = packing[:2], packing[2:]
    out, out_hp, _, stats, codes = output
    spec = QuantSpec.from_json(ctx.spec)
    if not _has_out_hp(spec, needs_gradient):
        out_hp = out  # nothing of P or V was rounded, so O is O'
    ctx.keys, ctx.num_heads_k = k.shape[-2 if k.ndim == 4 else 0], k.shape[1]
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    if ctx.impl == "triton":
        q, k, v = None, None, v if reads_value(spec, ctx.causal) else None
    ctx.save_for_backward(q, k, v, out_hp, stats, codes, key_mask, k_shift, *cu_seqlens)


def _backward(ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    options = (ctx.keys, ctx.num_heads_k, ctx.spec, ctx.causal, ctx.scale, ctx.impl)
    grads = _attention_backward(grad_out, *tensors, *options, cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens)
    return *grads, *(None,) * 11


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _packing(
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int
) -> Packing | None:
    """Arguments of the ops: all four, or none of them."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return None
    return Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _has_out_hp(spec: QuantSpec, needs_gradient: bool) -> bool:
    """Whether the forward returns O' beside O."""
    return needs_gradient and spec.pv == "nvfp4"
