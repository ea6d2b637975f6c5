"""The public attention: validate, resolve, call. One custom op with one autograd rule; docs/NUMERICS.md has the formulas."""

from __future__ import annotations

import logging
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import torch

from . import packed, reference
from .packed import Packing
from .spec import GROUP_SIZE, MAX_HEAD_DIM, NVFP4, QuantSpec

logger = logging.getLogger(__name__)

Impl = Literal["auto", "eager", "triton"]
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
            float64 (float32 is multiplied as TF32), not yet with packed sequences. `auto` takes `eager` on every device for
            now: the kernels have only run under Triton's interpreter and been compiled ahead of time, not yet measured on a GPU.

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
    if impl == "auto":
        impl = "eager"
        if q.device.type != "cpu":
            _log_eager(q.device.type)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = (spec.to_json(), causal, scale, needs_gradient, impl)
    out, _, lse, _ = _attention_forward(q, k, v, key_mask, k_shift, *options, *(packing or ()))
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """O, O' (empty where O serves, or no gradient is needed), LSE, and the row statistics for the backward of `triton`."""
    spec_ = QuantSpec.from_json(spec)
    options = {"spec": spec_, "causal": causal, "scale": scale, "with_twin": _has_twin(spec_, needs_gradient)}
    if impl == "triton":
        return _triton().forward(q, k, v, key_mask, k_shift, with_stats=needs_gradient, **options)
    with torch.autocast(q.device.type, enabled=False):  # the matrix products of the reference are float32 by definition
        if cu_seqlens_q is None:
            out, twin, lse = reference.forward(q, k, v, key_mask, k_shift, **options)
        else:
            packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            out, twin, lse = packed.forward(q, k, v, k_shift, packing, **options)
    return out, twin, lse, lse.new_empty(0)


@_attention_forward.register_fake
def _(q, k, v, key_mask, k_shift, spec, causal, scale, needs_gradient, impl, cu_seqlens_q=None, *_):
    twin = torch.empty_like(q) if _has_twin(QuantSpec.from_json(spec), needs_gradient) else q.new_empty(0)
    *heads, rows = q.shape[:3] if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    lse = q.new_empty((*heads, rows), dtype=reference.accumulator(q.dtype))
    has_stats = impl == "triton" and needs_gradient
    return torch.empty_like(q), twin, lse, lse.new_empty((*heads, 2, rows) if has_stats else 0)


@torch.library.custom_op("qat_kernels::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    twin: torch.Tensor,
    stats: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    spec: str,
    causal: bool,
    scale: float,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {"spec": QuantSpec.from_json(spec), "causal": causal, "scale": scale}
    if impl == "triton":
        return _triton().backward(grad_out, q, k, v, twin, stats, key_mask, k_shift, **options)
    with torch.autocast(q.device.type, enabled=False):
        if cu_seqlens_q is None:
            return reference.backward(grad_out, q, k, v, twin, key_mask, k_shift, **options)
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return packed.backward(grad_out, q, k, v, twin, k_shift, packing, **options)


@_attention_backward.register_fake
def _(grad_out, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, key_mask, k_shift, ctx.spec, ctx.causal, ctx.scale, needs_gradient, ctx.impl, *packing = inputs
    cu_seqlens, ctx.max_seqlens = packing[:2], packing[2:]
    out, twin, _, stats = output
    if not _has_twin(QuantSpec.from_json(ctx.spec), needs_gradient):
        twin = out  # nothing of P or V was rounded, so O is its own twin
    ctx.save_for_backward(q, k, v, twin, stats, key_mask, k_shift, *cu_seqlens)


def _backward(ctx, grad_out, _grad_twin, _grad_lse, _grad_stats):
    *tensors, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    options = (ctx.spec, ctx.causal, ctx.scale, ctx.impl)
    grads = _attention_backward(grad_out, *tensors, *options, cu_seqlens_q, cu_seqlens_k, *ctx.max_seqlens)
    return *grads, *(None,) * 11


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _has_twin(spec: QuantSpec, needs_gradient: bool) -> bool:
    return needs_gradient and spec.pv == "nvfp4"


def _triton() -> ModuleType:
    """The module of the kernels, imported when they are first asked for: this package works without triton."""
    try:
        from . import triton_attention
    except ModuleNotFoundError as error:
        raise ValueError(
            f"attention: impl='triton' needs the package triton ({error}); install it, or use impl='eager'"
        ) from error
    return triton_attention


@lru_cache
def _log_eager(device_type: str) -> None:
    logger.warning("qat_kernels: attention on %s runs the eager implementation: same numbers, but slow.", device_type)


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
    if impl == "triton" and q.dtype == torch.float64:
        refuse("dtype with impl='triton'", "float32, float16 or bfloat16; use impl='eager' for float64", q.dtype)
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
        if impl == "triton":
            refuse("impl with packed sequences", "'auto' or 'eager': the kernels cannot do this yet", "'triton'")
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
