"""The custom ops behind `attention`, with their fakes: one node each for `torch.compile` and for autograd (derivatives.py)."""

from __future__ import annotations

from typing import Any

import torch

from . import ran, reference, sageattn3, varlen
from .dispatch import fp4_kernels, training_kernels
from .mask import Bounds, Mask
from .spec import QuantSpec
from .varlen import Packing


@torch.library.custom_op("qat_kernels::attention_forward", mutates_args=())
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    spec: str,
    mask: str,
    scale: float,
    needs_gradient: bool,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    lower: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """O, O' (empty where O serves, or no gradient is needed), LSE, and what the backward of `triton` reads beside them."""
    ran.note("eager" if impl == "sdpa" else impl)  # which comes here for tangents alone
    spec_, mask_ = QuantSpec.from_json(spec), Mask.from_json(mask)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if impl == "triton":
        options: dict[str, Any] = {"with_gradient": needs_gradient, "spec": spec_, "mask": mask_, "scale": scale}
        options |= {"bounds": _bounds(lower, upper), "softcap": softcap, "sinks": sinks}
        with torch.autocast(q.device.type, enabled=False):  # the smoothing of `sage3` has matrix products of its own
            return tuple(training_kernels().forward(q, k, v, key_mask, k_shift, packing, **options))
    nothing = q.new_empty(0, dtype=torch.uint8)
    if impl == "fp4":
        out, lse = fp4_kernels().forward(q, k, v, key_mask, k_shift, packing, spec=spec_, mask=mask_, scale=scale)
        return out, q.new_empty(0), lse, lse.new_empty(0), nothing
    if impl == "sageattn3":
        with torch.autocast(q.device.type, enabled=False):
            out, lse = sageattn3.forward(q, k, v, key_mask, k_shift, packing, spec=spec_, mask=mask_, scale=scale)
        return out, q.new_empty(0), lse, lse.new_empty(0), nothing
    options = {"spec": spec_, "mask": mask_, "scale": scale, "softcap": softcap, "sinks": sinks}
    options["with_out_hp"] = has_out_hp(spec_, needs_gradient)
    with torch.autocast(q.device.type, enabled=False):  # the matrix products of the reference are float32 by definition
        if packing is None:
            out, out_hp, lse = reference.forward(q, k, v, key_mask, k_shift, bounds=_bounds(lower, upper), **options)
        else:
            out, out_hp, lse = varlen.forward(q, k, v, k_shift, packing, **options)
    return out, out_hp, lse, lse.new_empty(0), nothing


@attention_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    spec: str,
    mask: str,
    scale: float,
    needs_gradient: bool,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    lower: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    spec_, packing = QuantSpec.from_json(spec), _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    out_hp = torch.empty_like(q) if has_out_hp(spec_, needs_gradient) else q.new_empty(0)
    lse = q.new_empty(varlen.lse_shape(q.shape, packing), dtype=reference.accumulator(q.dtype))
    stats_shape = codes_shape = (0,)
    if impl == "triton":
        stats_shape, codes_shape = training_kernels().output_shapes(
            q.shape, k.shape, packing, spec=spec_, mask=Mask.from_json(mask), with_gradient=needs_gradient
        )
    return torch.empty_like(q), out_hp, lse, lse.new_empty(stats_shape), q.new_empty(codes_shape, dtype=torch.uint8)


@torch.library.custom_op("qat_kernels::attention_backward", mutates_args=())
def attention_backward(
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
    mask: str,
    scale: float,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    lower: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV and that of the sinks (empty without).

    `triton` takes `stats` and `codes` of its forward in place of Q and K, and V only where it is read again.
    """
    spec_, mask_ = QuantSpec.from_json(spec), Mask.from_json(mask)
    packing = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if impl == "triton":
        shape = _key_shape(grad_out, keys, num_heads_k)
        options: dict[str, Any] = {"key_shape": shape, "spec": spec_, "mask": mask_, "scale": scale, "query": q, "key": k}
        options |= {"bounds": _bounds(lower, upper), "softcap": softcap, "sinks": sinks}
        with torch.autocast(grad_out.device.type, enabled=False):
            return training_kernels().backward(grad_out, v, out_hp, stats, codes, key_mask, packing, **options)
    assert q is not None and k is not None and v is not None, "eager reads its inputs again"
    options = {"spec": spec_, "mask": mask_, "scale": scale, "softcap": softcap, "sinks": sinks}
    with torch.autocast(grad_out.device.type, enabled=False):
        if packing is None:
            bounds = _bounds(lower, upper)
            return reference.backward(grad_out, q, k, v, out_hp, key_mask, k_shift, bounds=bounds, **options)
        return varlen.backward(grad_out, q, k, v, out_hp, k_shift, packing, **options)


@attention_backward.register_fake
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
    spec: str,
    mask: str,
    scale: float,
    impl: str,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    lower: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = _key_shape(grad_out, keys, num_heads_k)
    of_sinks = grad_out.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return grad_out.new_empty(grad_out.shape), grad_out.new_empty(shape), grad_out.new_empty(shape), of_sinks


@torch.library.custom_op("qat_kernels::attention_tangent", mutates_args=())
def attention_tangent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor,
    k_tangent: torch.Tensor,
    v_tangent: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    spec: str,
    mask: str,
    scale: float,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    lower: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    sinks_tangent: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tangent of O, in eager PyTorch whatever computed O."""
    options: dict[str, Any] = {"spec": QuantSpec.from_json(spec), "mask": Mask.from_json(mask), "scale": scale}
    options |= {"softcap": softcap, "sinks": sinks, "sinks_tangent": sinks_tangent}
    packing, tangents = _packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), (q_tangent, k_tangent, v_tangent)
    with torch.autocast(q.device.type, enabled=False):
        if packing is None:
            return reference.tangent(q, k, v, tangents, key_mask, k_shift, bounds=_bounds(lower, upper), **options)
        return varlen.tangent(q, k, v, tangents, k_shift, packing, **options)


@attention_tangent.register_fake
def _(q: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
    return torch.empty_like(q)


def _key_shape(grad_out: torch.Tensor, keys: int, num_heads_k: int) -> torch.Size:
    """Of K and V: [B, Hk, Lk, D], or [total, Hk, D] of packed sequences."""
    head_dim = grad_out.shape[-1]
    return torch.Size((grad_out.shape[0], num_heads_k, keys, head_dim) if grad_out.ndim == 4 else (keys, num_heads_k, head_dim))


def _packing(
    cu_seqlens_q: torch.Tensor | None, cu_seqlens_k: torch.Tensor | None, max_seqlen_q: int, max_seqlen_k: int
) -> Packing | None:
    """Arguments of the ops: all four, or none of them."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return None
    return Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _bounds(lower: torch.Tensor | None, upper: torch.Tensor | None) -> Bounds | None:
    """Arguments of the ops: both, or none of them."""
    return None if lower is None or upper is None else Bounds(lower, upper)


def has_out_hp(spec: QuantSpec, needs_gradient: bool) -> bool:
    """Whether the forward returns O' beside O."""
    return needs_gradient and spec.quantizes_pv
