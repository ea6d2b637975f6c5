"""The public attention: validate, resolve, call. One custom op with one autograd rule; docs/NUMERICS.md has the formulas."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import torch

from . import packed, reference
from .packed import Packing
from .spec import GROUP_SIZE, MAX_HEAD_DIM, NVFP4, QuantSpec

logger = logging.getLogger(__name__)

Impl = Literal["auto", "eager", "triton", "fp4"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if all(x is None for x in packing):
        packing = None
    _validate(q, k, v, spec, key_mask, k_shift, packing, impl)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if impl == "auto":
        impl = resolve(q.device, q.dtype)
    elif impl == "fp4" and needs_gradient:
        raise ValueError("attention: impl='fp4' has no gradient; call it under torch.no_grad(), or use impl='triton'")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = (spec.to_json(), causal, scale, needs_gradient, impl)
    out, _, lse, *_ = _attention_forward(q, k, v, key_mask, k_shift, *options, *(packing or ()))
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
    options = {"spec": spec_, "causal": causal, "scale": scale}
    if impl == "triton":
        kernels = _triton("triton_attention")
        return tuple(kernels.forward(q, k, v, key_mask, k_shift, packing, with_gradient=needs_gradient, **options))
    if impl == "fp4":
        out, lse = _triton("triton_inference").forward(q, k, v, key_mask, k_shift, packing, **options)
        return out, q.new_empty(0), lse, lse.new_empty(0), q.new_empty(0, dtype=torch.uint8)
    options["with_twin"] = _has_twin(spec_, needs_gradient)
    with torch.autocast(q.device.type, enabled=False):  # the matrix products of the reference are float32 by definition
        if packing is None:
            out, twin, lse = reference.forward(q, k, v, key_mask, k_shift, **options)
        else:
            out, twin, lse = packed.forward(q, k, v, k_shift, packing, **options)
    return out, twin, lse, lse.new_empty(0), q.new_empty(0, dtype=torch.uint8)


@_attention_forward.register_fake
def _(
    q, k, v, key_mask, k_shift, spec, causal, scale, needs_gradient, impl,
    cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0,
):  # fmt: skip
    spec_, packing = QuantSpec.from_json(spec), _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    twin = torch.empty_like(q) if _has_twin(spec_, needs_gradient) else q.new_empty(0)
    lse = q.new_empty(packed.lse_shape(q.shape, packing), dtype=reference.accumulator(q.dtype))
    stats_shape = codes_shape = (0,)
    if impl == "triton":
        options = {"spec": spec_, "causal": causal, "with_gradient": needs_gradient}
        stats_shape, codes_shape = _triton("triton_attention").output_shapes(q.shape, k.shape, packing, **options)
    return torch.empty_like(q), twin, lse, lse.new_empty(stats_shape), q.new_empty(codes_shape, dtype=torch.uint8)


@torch.library.custom_op("qat_kernels::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    twin: torch.Tensor,
    stats: torch.Tensor,
    codes: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    keys: int,
    key_heads: int,
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
    options = {"spec": QuantSpec.from_json(spec), "causal": causal, "scale": scale}
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if impl == "triton":
        shape = _key_shape(grad_out, keys, key_heads)
        backward = _triton("triton_attention").backward
        return backward(grad_out, v, twin, stats, codes, key_mask, packing, key_shape=shape, **options)
    with torch.autocast(grad_out.device.type, enabled=False):
        if packing is None:
            return reference.backward(grad_out, q, k, v, twin, key_mask, k_shift, **options)
        return packed.backward(grad_out, q, k, v, twin, k_shift, packing, **options)


@_attention_backward.register_fake
def _(grad_out, q, k, v, twin, stats, codes, key_mask, k_shift, keys, key_heads, *_, **__):
    shape = _key_shape(grad_out, keys, key_heads)
    return grad_out.new_empty(grad_out.shape), grad_out.new_empty(shape), grad_out.new_empty(shape)


def _key_shape(grad_out: torch.Tensor, keys: int, key_heads: int) -> torch.Size:
    """Of K and V: [B, Hk, Lk, D], or [total, Hk, D] of packed sequences."""
    head_dim = grad_out.shape[-1]
    return torch.Size((grad_out.shape[0], key_heads, keys, head_dim) if grad_out.ndim == 4 else (keys, key_heads, head_dim))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, key_mask, k_shift, ctx.spec, ctx.causal, ctx.scale, needs_gradient, ctx.impl, *packing = inputs
    cu_seqlens, ctx.max_seqlens = packing[:2], packing[2:]
    out, twin, _, stats, codes = output
    spec = QuantSpec.from_json(ctx.spec)
    if not _has_twin(spec, needs_gradient):
        twin = out  # nothing of P or V was rounded, so O is its own twin
    ctx.keys, ctx.key_heads = k.shape[-2 if k.ndim == 4 else 0], k.shape[1]
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    if ctx.impl == "triton":
        q, k, v = None, None, v if _triton("triton_attention").reads_value(spec, ctx.causal) else None
    ctx.save_for_backward(q, k, v, twin, stats, codes, key_mask, k_shift, *cu_seqlens)


def _backward(ctx, grad_out, *_):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    options = (ctx.keys, ctx.key_heads, ctx.spec, ctx.causal, ctx.scale, ctx.impl)
    grads = _attention_backward(grad_out, *tensors, *options, cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens)
    return *grads, *(None,) * 11


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> Packing | None:
    return None if cu_seqlens_q is None else Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _has_twin(spec: QuantSpec, needs_gradient: bool) -> bool:
    return needs_gradient and spec.pv == "nvfp4"


@lru_cache
def _triton(name: str) -> ModuleType:
    """A module of kernels, imported when they are first asked for: this package works without triton."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        raise ValueError(f"attention: the kernels need the package triton ({error}); install it, or use impl='eager'") from error


@torch.compiler.assume_constant_result
def resolve(device: torch.device, dtype: torch.dtype) -> Impl:
    """What `auto` takes."""
    return "eager" if device.type == "cpu" else _resolve(device, dtype)


@lru_cache
def _resolve(device: torch.device, dtype: torch.dtype) -> Impl:
    """Says once for each device and dtype why a GPU runs the slow one."""
    try:
        if dtype == torch.float64:
            raise ValueError("float64 is for eager only")
        _triton("triton_attention").check_device(device)
    except ValueError as reason:
        logger.warning("qat_kernels: attention runs the eager implementation: same numbers, but slow (%s).", reason)
        return "eager"
    return "triton"


def _validate(q, k, v, spec, key_mask, k_shift, packing: Packing | None, impl) -> None:
    def refuse(what: str, expected: str, got: object) -> None:
        raise ValueError(f"attention: {what}: expected {expected}, got {got}")

    if not isinstance(spec, QuantSpec):
        refuse("spec", "a QuantSpec", repr(spec))
    if impl not in get_args(Impl):
        refuse("impl", f"one of {', '.join(get_args(Impl))}", repr(impl))
    layout = "batch, heads, length, head_dim" if packing is None else "total, heads, head_dim"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.ndim != layout.count(",") + 1:
            refuse(
                name,
                f"a tensor [{layout}]" + (" with cu_seqlens" if packing is not None else ""),
                f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x),
            )
    if q.dtype not in _DTYPES or not q.dtype == k.dtype == v.dtype:
        refuse(
            "dtypes of q, k, v",
            "one of float32, float16, bfloat16 (float64 for tests) for all three; cast them first",
            f"{q.dtype}, {k.dtype}, {v.dtype}",
        )
    if impl in ("triton", "fp4") and q.dtype == torch.float64:
        refuse(f"dtype with impl={impl!r}", "float32, float16 or bfloat16; use impl='eager' for float64", q.dtype)
    if not q.device == k.device == v.device:
        refuse("devices of q, k, v", "one device", f"{q.device}, {k.device}, {v.device}")
    heads, key_heads, head_dim = q.shape[1], k.shape[1], q.shape[-1]
    if k.shape != v.shape:
        expected = "[B, Hk, Lk, D]" if packing is None else "[total_k, Hk, D]"
        refuse("shapes of k and v", f"equal shapes {expected}", f"{tuple(k.shape)} and {tuple(v.shape)}")
    if packing is not None:
        if k.shape[-1] != head_dim:
            refuse("shape of k", f"[total_k, Hk, {head_dim}], head_dim as in q", tuple(k.shape))
        packing.check_arguments(len(q), len(k), q.device)
        if key_mask is not None:
            refuse("key_mask with packed sequences", "None; pack the allowed tokens alone", "a mask")
    elif (k.shape[0], k.shape[-1]) != (q.shape[0], head_dim):
        refuse("shape of k", f"[{q.shape[0]}, Hk, Lk, {head_dim}], batch and head_dim as in q", tuple(k.shape))
    if key_heads == 0 or heads % key_heads:
        refuse("heads", "the query heads to be a multiple of the key heads", f"{heads} and {key_heads}")
    if head_dim % GROUP_SIZE or not GROUP_SIZE <= head_dim <= MAX_HEAD_DIM:
        refuse(
            "head_dim", f"a multiple of {GROUP_SIZE} from {GROUP_SIZE} to {MAX_HEAD_DIM}; pad q, k and v and pass scale", head_dim
        )
    if spec.rotate and head_dim & (head_dim - 1):
        refuse("head_dim with QuantSpec(rotate=True)", "a power of two", head_dim)
    optional = (
        ("key_mask", key_mask, torch.bool, (k.shape[0], k.shape[-2]), ", True where a key may be seen"),
        ("k_shift", k_shift, torch.float32, (key_heads, head_dim), ""),
    )
    for name, x, dtype, shape, meaning in optional:
        if x is None:
            continue
        got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
        if not isinstance(x, torch.Tensor) or (x.dtype, tuple(x.shape), x.device) != (dtype, shape, q.device):
            refuse(name, f"{dtype} {list(shape)} on {q.device}{meaning}", got)
