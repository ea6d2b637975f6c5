"""What runs behind `attention`, and the custom ops around it with their fakes: one node each for `torch.compile` and autograd.

Where nobody has to see a node, a call does without (derivatives.py): the layers around an op cost more than a small call itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._C._functorch import is_functorch_wrapped_tensor as is_wrapped
from torch._C._functorch import is_legacy_batchedtensor as is_batched  # of autograd's `is_grads_batched`

from . import ran, reference, sageattn3, varlen
from .arguments import Options
from .dispatch import fp4_kernels, training_kernels
from .mask import Bounds, Mask
from .spec import QuantSpec
from .varlen import Packing


class Extras(NamedTuple):
    """The tensors that a call may have besides Q, K and V."""

    key_mask: torch.Tensor | None
    k_shift: torch.Tensor | None
    q_shift: torch.Tensor | None
    packing: Packing | None
    bounds: Bounds | None
    sinks: torch.Tensor | None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All of them: key_mask, k_shift, q_shift, cu_seqlens_q, cu_seqlens_k, lower, upper, sinks."""
        *first, packing, bounds, sinks = self
        return *first, *((None, None) if packing is None else packing[:2]), *(bounds or (None, None)), sinks

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor | None], max_seqlens: Sequence[int]) -> Extras:
        """From `tensors`."""
        key_mask, k_shift, q_shift, cu_seqlens_q, cu_seqlens_k, lower, upper, sinks = tensors
        packing = bounds = None
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            packing = Packing(cu_seqlens_q, cu_seqlens_k, *max_seqlens)
        if lower is not None and upper is not None:
            bounds = Bounds(lower, upper)
        return cls(key_mask, k_shift, q_shift, packing, bounds, sinks)


NO_EXTRAS = Extras(None, None, None, None, None, None)


def seen_by_others(*tensors: torch.Tensor) -> bool:
    """Whether somebody has to see a node for a call with these: torch.compile and export, modes (fakes, selective checkpointing,
    counters of operations), vmap, torch.jit.trace, the class of a tensor, or what left a transform of `torch.func`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or not all(map(_is_plain, tensors))
    )


def _is_plain(x: torch.Tensor) -> bool:
    return type(x) in (torch.Tensor, torch.nn.Parameter) and not (x.is_meta or is_wrapped(x) or is_batched(x))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, options: Options
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """O, O', LSE, and what the backward of `triton` reads beside them.

    O' is None or empty where O serves, or no gradient is needed; the last two where the backward reads nothing of them.
    """
    spec, mask, scale, softcap, impl = options.spec, options.mask, options.scale, options.softcap, options.impl
    key_mask, k_shift, q_shift, packing, bounds, sinks = extras
    ran.note("eager" if impl == "sdpa" else impl)  # which comes here for tangents alone
    if impl == "triton":
        return training_kernels().forward(
            q, k, v, key_mask, k_shift, packing,
            spec=spec, mask=mask, scale=scale, with_gradient=options.needs_gradient, q_shift=q_shift, bounds=bounds,
            softcap=softcap, sinks=sinks,
        )  # fmt: skip
    nothing = q.new_empty(0, dtype=torch.uint8)
    if impl == "fp4":
        out, lse = fp4_kernels().forward(q, k, v, key_mask, k_shift, packing, spec=spec, mask=mask, scale=scale, q_shift=q_shift)
        return out, q.new_empty(0), lse, lse.new_empty(0), nothing
    with torch.autocast(q.device.type, enabled=False):  # the matrix products of the reference are float32 by definition
        if impl == "sageattn3":
            out, lse = sageattn3.forward(q, k, v, key_mask, k_shift, packing, spec=spec, mask=mask, scale=scale)
            return out, q.new_empty(0), lse, lse.new_empty(0), nothing
        numerics: dict[str, Any] = {"spec": spec, "mask": mask, "scale": scale, "softcap": softcap, "sinks": sinks}
        numerics["with_out_hp"] = options.has_out_hp
        if packing is None:
            out, out_hp, lse = reference.forward(q, k, v, key_mask, k_shift, q_shift, bounds=bounds, **numerics)
        else:
            out, out_hp, lse = varlen.forward(q, k, v, k_shift, q_shift, packing, **numerics)
    return out, out_hp, lse, lse.new_empty(0), nothing


def backward(
    grad_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    out_hp: torch.Tensor,
    stats: torch.Tensor,
    codes: torch.Tensor,
    key_shape: torch.Size,
    extras: Extras,
    options: Options,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dQ, dK, dV and that of the sinks (None or empty without).

    `triton` takes `stats` and `codes` of its forward in place of Q and K, and V only where it is read again.
    """
    spec, mask, scale, softcap = options.spec, options.mask, options.scale, options.softcap
    key_mask, k_shift, q_shift, packing, bounds, sinks = extras
    if options.impl == "triton":
        return training_kernels().backward(
            grad_out, v, out_hp, stats, codes, key_mask, packing,
            key_shape=key_shape, spec=spec, mask=mask, scale=scale, q_shift=q_shift, bounds=bounds, softcap=softcap, sinks=sinks,
            query=q, key=k,
        )  # fmt: skip
    assert q is not None and k is not None and v is not None, "eager reads its inputs again"
    numerics: dict[str, Any] = {"spec": spec, "mask": mask, "scale": scale, "softcap": softcap, "sinks": sinks}
    with torch.autocast(grad_out.device.type, enabled=False):
        if packing is None:
            return reference.backward(grad_out, q, k, v, out_hp, key_mask, k_shift, q_shift, bounds=bounds, **numerics)
        return varlen.backward(grad_out, q, k, v, out_hp, k_shift, q_shift, packing, **numerics)


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
    q_shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`forward`, with plain values in place of options and tensors of their own; what is None there is empty.

    q_shift: last, as `head_dim` of the backward: compiled code of an older version, which Inductor keeps on disk, passes none.
    """
    tensors = (key_mask, k_shift, q_shift, cu_seqlens_q, cu_seqlens_k, lower, upper, sinks)
    extras = Extras.of(tensors, (max_seqlen_q, max_seqlen_k))
    options = Options(QuantSpec.from_json(spec), Mask.from_json(mask), scale, softcap, impl, needs_gradient)
    out, out_hp, lse, stats, codes = forward(q, k, v, extras, options)
    out_hp, stats = q.new_empty(0) if out_hp is None else out_hp, lse.new_empty(0) if stats is None else stats
    return out, out_hp, lse, stats, q.new_empty(0, dtype=torch.uint8) if codes is None else codes


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
    q_shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    spec_ = QuantSpec.from_json(spec)
    packing = Extras.of((None,) * 3 + (cu_seqlens_q, cu_seqlens_k, None, None, None), (max_seqlen_q, max_seqlen_k)).packing
    out = reference.empty_out(q, v.shape[-1])
    out_hp = torch.empty_like(out) if needs_gradient and spec_.quantizes_pv else q.new_empty(0)
    lse = q.new_empty(varlen.lse_shape(q.shape, packing), dtype=reference.accumulator(q.dtype))
    stats_shape = codes_shape = (0,)
    if impl == "triton":
        stats_shape, codes_shape = training_kernels().output_shapes(
            q.shape, v.shape, packing, spec=spec_, mask=Mask.from_json(mask), with_gradient=needs_gradient,
            key_bias=q_shift is not None,
        )  # fmt: skip
    return out, out_hp, lse, lse.new_empty(stats_shape), q.new_empty(codes_shape, dtype=torch.uint8)


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
    head_dim: int | None = None,
    q_shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward`, with plain values in place of options and tensors of their own; what is None there is empty.

    head_dim: of Q and K; None: that of dO. Compiled code of an older version, which Inductor keeps on disk, passes none.
    """
    tensors = (key_mask, k_shift, q_shift, cu_seqlens_q, cu_seqlens_k, lower, upper, sinks)
    extras = Extras.of(tensors, (max_seqlen_q, max_seqlen_k))
    options = Options(QuantSpec.from_json(spec), Mask.from_json(mask), scale, softcap, impl)
    key_shape = _key_shape(grad_out, keys, num_heads_k, head_dim)
    dq, dk, dv, grad_sinks = backward(grad_out, q, k, v, out_hp, stats, codes, key_shape, extras, options)
    return dq, dk, dv, grad_out.new_empty(0) if grad_sinks is None else grad_sinks


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
    head_dim: int | None = None,
    q_shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    shapes = reference.gradient_shapes(grad_out.shape, _key_shape(grad_out, keys, num_heads_k, head_dim))
    dq, dk, dv = map(grad_out.new_empty, shapes)
    return dq, dk, dv, grad_out.new_empty(0) if sinks is None else torch.empty_like(sinks)


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
    q_shift: torch.Tensor | None = None,
) -> torch.Tensor:
    """The tangent of O, in eager PyTorch even if a kernel computed O."""
    tensors = (key_mask, k_shift, q_shift, cu_seqlens_q, cu_seqlens_k, lower, upper, sinks)
    extras = Extras.of(tensors, (max_seqlen_q, max_seqlen_k))
    numerics: dict[str, Any] = {"spec": QuantSpec.from_json(spec), "mask": Mask.from_json(mask), "scale": scale}
    numerics |= {"softcap": softcap, "sinks": sinks, "sinks_tangent": sinks_tangent}
    tangents = (q_tangent, k_tangent, v_tangent)
    with torch.autocast(q.device.type, enabled=False):
        if extras.packing is None:
            return reference.tangent(q, k, v, tangents, key_mask, k_shift, q_shift, bounds=extras.bounds, **numerics)
        return varlen.tangent(q, k, v, tangents, k_shift, q_shift, extras.packing, **numerics)


@attention_tangent.register_fake
def _(q: torch.Tensor, _: torch.Tensor, v: torch.Tensor, *__: object, **___: object) -> torch.Tensor:
    return reference.empty_out(q, v.shape[-1])


def op_arguments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, options: Options) -> tuple[Any, ...]:
    """Those of `attention_forward`."""
    plain = (options.spec.to_json(), options.mask.to_json(), options.scale, options.needs_gradient, options.impl)
    return q, k, v, extras.key_mask, extras.k_shift, *plain, *_last_arguments(extras, options.softcap), extras.q_shift


def extras_and_options(inputs: Sequence[Any]) -> tuple[Extras, Options]:
    """Of the arguments of `attention_forward`."""
    _, _, _, key_mask, k_shift, spec, mask, scale, needs_gradient, impl, *cu_seqlens, longest_q, longest_k = inputs[:14]
    *bounds, softcap, sinks, q_shift = inputs[14:]
    extras = Extras.of((key_mask, k_shift, q_shift, *cu_seqlens, *bounds, sinks), (longest_q, longest_k))
    return extras, Options(QuantSpec.from_json(spec), Mask.from_json(mask), scale, softcap, impl, needs_gradient)


def backward_arguments(key_shape: torch.Size, extras: Extras, options: Options) -> tuple[Any, ...]:
    """Those of `attention_backward` from the key mask on."""
    keys = key_shape[-2 if len(key_shape) == 4 else 0]
    plain = (keys, key_shape[1], options.spec.to_json(), options.mask.to_json(), options.scale, options.impl)
    last = (*_last_arguments(extras, options.softcap), key_shape[-1], extras.q_shift)
    return extras.key_mask, extras.k_shift, *plain, *last


def tangent_arguments(extras: Extras, options: Options) -> tuple[Any, ...]:
    """Those of `attention_tangent` from the key mask to the sinks."""
    plain = (options.spec.to_json(), options.mask.to_json(), options.scale)
    return extras.key_mask, extras.k_shift, *plain, *_last_arguments(extras, options.softcap)


def _last_arguments(extras: Extras, softcap: float | None) -> tuple[Any, ...]:
    """What all ops take behind their options: packed sequences, bounds, the soft cap and sinks."""
    _, _, _, cu_seqlens_q, cu_seqlens_k, lower, upper, sinks = extras.tensors
    max_seqlens = (0, 0) if extras.packing is None else extras.packing[2:]
    return cu_seqlens_q, cu_seqlens_k, *max_seqlens, lower, upper, softcap, sinks


def _key_shape(grad_out: torch.Tensor, keys: int, num_heads_k: int, head_dim: int | None) -> torch.Size:
    """Of K: [B, Hk, Lk, D], or [total, Hk, D] of packed sequences."""
    head_dim = grad_out.shape[-1] if head_dim is None else head_dim
    return torch.Size((grad_out.shape[0], num_heads_k, keys, head_dim) if grad_out.ndim == 4 else (keys, num_heads_k, head_dim))
