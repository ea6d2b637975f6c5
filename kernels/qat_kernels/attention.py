"""The public attention: validate, resolve, call. One custom op with one autograd rule; docs/NUMERICS.md has the formulas."""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import torch

from . import reference
from .spec import GROUP_SIZE, MAX_HEAD_DIM, NVFP4, QuantSpec

logger = logging.getLogger(__name__)

Impl = Literal["auto", "eager", "triton", "fp4"]
AUTO = "eager"
"""What `auto` takes, on every device: the kernels have not been measured on a GPU yet."""
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
        q: queries [B, H, Lq, D]; D a multiple of 16 up to 256; float32, float16, bfloat16 (float64 for tests).
            Any strides: transposed views are fine and cost no copy.
        k, v: keys and values [B, Hk, Lk, D] of the same dtype and device; H is a multiple of Hk (grouped-query attention:
            query head h reads key head h // (H / Hk)).
        spec: what is quantized, and how.
        causal: query i may see key j if j <= i + (Lk - Lq). The query's own group of 16 keys and the first group of the
            sequence stay in high precision (section 4), which makes the result strictly causal.
        scale: factor of the scores; default D ** -0.5.
        key_mask: bool [B, Lk], True where a key may be seen. Excluded keys and values are never computed with, whatever
            they hold. Groups along tokens are counted from the first allowed key.
        k_shift: float32 [Hk, D], subtracted from the keys before quantization; does not change the exact scores.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: packed sequences; not supported yet.
        return_lse: also return the log-sum-exp of the true scores, not differentiable.
        impl: `eager` is PyTorch on any device; `triton` is the fused kernels, for NVIDIA GPUs from sm_80 on and all dtypes but
            float64 (float32 is multiplied as TF32); `fp4` is the kernel for FP4 units, without a gradient, which other GPUs from
            sm_80 on emulate. `auto` takes `eager` on every device for now: the kernels have only run under Triton's interpreter
            and been compiled ahead of time, not yet measured on a GPU. `explain` says what runs, and why nothing faster does.

    Returns:
        The output [B, H, Lq, D] in the dtype and stride order of `q`; with `return_lse` also float32 [B, H, Lq] (float64
        for float64 inputs). Rows that may see no key are 0, their log-sum-exp is -inf.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or `impl` cannot run here; the message says what was expected.
    """
    if any(x is not None for x in (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)):
        raise ValueError(
            "attention: packed sequences (cu_seqlens_*, max_seqlen_*) are not supported yet; pass a batch with key_mask"
        )
    _validate(q, k, v, spec, key_mask, k_shift, impl)
    needs_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if impl == "auto":
        impl = AUTO
        if q.device.type != "cpu":
            _log_eager(q.device.type)
    elif impl == "fp4" and needs_gradient:
        raise ValueError("attention: impl='fp4' has no gradient; call it under torch.no_grad(), or use impl='triton'")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, _, lse, _ = _attention_forward(q, k, v, key_mask, k_shift, spec.to_json(), causal, scale, needs_gradient, impl)
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """O, O' (empty where O serves, or no gradient is needed), LSE, and the row statistics for the backward of `triton`."""
    spec_ = QuantSpec.from_json(spec)
    options = {"spec": spec_, "causal": causal, "scale": scale, "with_twin": _has_twin(spec_, needs_gradient)}
    if impl == "triton":
        return _triton("triton_attention").forward(q, k, v, key_mask, k_shift, with_stats=needs_gradient, **options)
    if impl == "fp4":
        out, lse = _triton("triton_inference").forward(q, k, v, key_mask, k_shift, spec=spec_, causal=causal, scale=scale)
        return out, q.new_empty(0), lse, lse.new_empty(0)
    with torch.autocast(q.device.type, enabled=False):  # the matrix products of the reference are float32 by definition
        out, twin, lse = reference.forward(q, k, v, key_mask, k_shift, **options)
    return out, twin, lse, lse.new_empty(0)


@_attention_forward.register_fake
def _(q, k, v, key_mask, k_shift, spec, causal, scale, needs_gradient, impl):
    twin = torch.empty_like(q) if _has_twin(QuantSpec.from_json(spec), needs_gradient) else q.new_empty(0)
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype)
    has_stats = impl == "triton" and needs_gradient
    return torch.empty_like(q), twin, lse, lse.new_empty((*q.shape[:2], 2, q.shape[2]) if has_stats else 0)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    options = {"spec": QuantSpec.from_json(spec), "causal": causal, "scale": scale}
    if impl == "triton":
        return _triton("triton_attention").backward(grad_out, q, k, v, twin, stats, key_mask, k_shift, **options)
    with torch.autocast(q.device.type, enabled=False):
        return reference.backward(grad_out, q, k, v, twin, key_mask, k_shift, **options)


@_attention_backward.register_fake
def _(grad_out, q, k, v, twin, stats, key_mask, k_shift, spec, causal, scale, impl):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, key_mask, k_shift, ctx.spec, ctx.causal, ctx.scale, needs_gradient, ctx.impl = inputs
    out, twin, _, stats = output
    if not _has_twin(QuantSpec.from_json(ctx.spec), needs_gradient):
        twin = out  # nothing of P or V was rounded, so O is its own twin
    ctx.save_for_backward(q, k, v, twin, stats, key_mask, k_shift)


def _backward(ctx, grad_out, _grad_twin, _grad_lse, _grad_stats):
    grads = _attention_backward(grad_out, *ctx.saved_tensors, ctx.spec, ctx.causal, ctx.scale, ctx.impl)
    return *grads, None, None, None, None, None, None, None


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _has_twin(spec: QuantSpec, needs_gradient: bool) -> bool:
    return needs_gradient and spec.pv == "nvfp4"


def _triton(name: str) -> ModuleType:
    """A module of kernels, imported when they are first asked for: this package works without triton."""
    try:
        return importlib.import_module(f".{name}", __package__)
    except ModuleNotFoundError as error:
        raise ValueError(f"attention: the kernels need the package triton ({error}); install it, or use impl='eager'") from error


@lru_cache
def _log_eager(device_type: str) -> None:
    logger.warning("qat_kernels: attention on %s runs the eager implementation: same numbers, but slow.", device_type)


def _validate(q, k, v, spec, key_mask, k_shift, impl) -> None:
    def refuse(what: str, expected: str, got: object) -> None:
        raise ValueError(f"attention: {what}: expected {expected}, got {got}")

    if not isinstance(spec, QuantSpec):
        refuse("spec", "a QuantSpec", repr(spec))
    if impl not in get_args(Impl):
        refuse("impl", f"one of {', '.join(get_args(Impl))}", repr(impl))
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            refuse(
                name,
                "a tensor [batch, heads, length, head_dim]",
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
    batch, heads, _, head_dim = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    if k.shape != v.shape:
        refuse("shapes of k and v", "equal shapes [B, Hk, Lk, D]", f"{tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        refuse("shape of k", f"[{batch}, Hk, Lk, {head_dim}], batch and head_dim as in q", tuple(k.shape))
    if key_heads == 0 or heads % key_heads:
        refuse("heads", "the query heads to be a multiple of the key heads", f"{heads} and {key_heads}")
    if head_dim % GROUP_SIZE or not GROUP_SIZE <= head_dim <= MAX_HEAD_DIM:
        refuse(
            "head_dim", f"a multiple of {GROUP_SIZE} from {GROUP_SIZE} to {MAX_HEAD_DIM}; pad q, k and v and pass scale", head_dim
        )
    if spec.rotate and head_dim & (head_dim - 1):
        refuse("head_dim with QuantSpec(rotate=True)", "a power of two", head_dim)
    optional = (
        ("key_mask", key_mask, torch.bool, (batch, keys), ", True where a key may be seen"),
        ("k_shift", k_shift, torch.float32, (key_heads, head_dim), ""),
    )
    for name, x, dtype, shape, meaning in optional:
        if x is None:
            continue
        got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
        if not isinstance(x, torch.Tensor) or (x.dtype, tuple(x.shape), x.device) != (dtype, shape, q.device):
            refuse(name, f"{dtype} {list(shape)} on {q.device}{meaning}", got)
