"""Derivatives of attention: gradients, tangents of forward mode, `torch.func` and vmap. Others are refused by name.

Ordinary calls go through `attention_with_gradient`, which costs little; where somebody has to see a node (`ops.seen_by_others`),
through the op, which has the same gradient. An op cannot have a rule for forward mode, and would give a tangent of zero there,
silently. So under derivatives of `torch.func`, and in a `forward_ad.dual_level`, a call goes through
`attention_under_transforms`, which has a rule for each. vmap alone runs the op for one sample after the other.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, NoReturn

import torch

from . import ops
from .arguments import Options
from .ops import (
    NO_EXTRAS,
    Extras,
    attention_backward,
    attention_forward,
    attention_tangent,
    backward_arguments,
    extras_and_options,
    tangent_arguments,
)
from .spec import INFERENCE_KERNELS
from .transforms import transformed

logger = logging.getLogger(__name__)


def refuse_second_derivative(got: str) -> NoReturn:
    """Raise a ValueError that names the requested derivative."""
    raise ValueError(
        "attention: expected one derivative: a gradient (backward, torch.func.grad) or a tangent (torch.func.jvp), under vmap or "
        f"not; got {got}. The straight-through rule has no second derivative: detach what needs none, or use original attention"
    )


class _Once(torch.autograd.Function):
    """The base of functions whose results are derivatives already: a further derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps nothing."""

    @staticmethod
    def jvp(ctx: Any, *_: torch.Tensor | None) -> NoReturn:
        refuse_second_derivative("the tangent of a derivative")

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor | None) -> NoReturn:
        refuse_second_derivative("the gradient of a derivative")


class _Gradient(_Once):
    @staticmethod
    def forward(*inputs: Any) -> tuple[torch.Tensor, ...]:
        return attention_backward(*inputs)


class _Tangent(_Once):
    @staticmethod
    def forward(*inputs: Any) -> torch.Tensor:
        return attention_tangent(*inputs)


class _Plain(torch.autograd.Function):
    """O and LSE of an ordinary call, which needs no node of the op."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, extras: Extras, options: Options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        results = ops.forward(q, k, v, extras, options)
        out, _, lse, *_ = results
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*_needed_again(q, k, v, options), *_keep(ctx, k, extras, options, results))
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, _: None) -> tuple[torch.Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 6
        return *_gradient(ctx, grad_out, seen=torch.is_grad_enabled() or ops.seen_by_others(grad_out)), None, None


# `Function.apply` looks for transforms of `torch.func` and for what left them: `ops.seen_by_others` has done so.
_apply_plain = super(torch.autograd.Function, _Plain).apply


def attention_with_gradient(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE, with a gradient of O."""
    return _apply_plain(q, k, v, extras.sinks, extras, options)


class _Attention(torch.autograd.Function):
    """`attention_forward` for transforms: whether somebody sees LSE, and the arguments of the op; its results."""

    generate_vmap_rule = True

    @staticmethod
    def forward(return_lse: bool, *inputs: Any) -> tuple[torch.Tensor, ...]:
        return attention_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.return_lse, q, k, v, *_ = inputs
        ctx.others = [(x.shape, x.dtype) for x in output[1:4]]
        saved = q, k, v, *_keep(ctx, k, *extras_and_options(inputs[1:]), output)
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)  # under vmap both must be the same

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        impl = ctx.options.impl
        if impl in INFERENCE_KERNELS:
            raise ValueError(f"attention: impl={impl!r} has no derivative; use impl='auto'")
        if ctx.return_lse:
            raise ValueError("attention: return_lse=True: the log-sum-exp has no tangent; call without it in forward mode")
        if impl in ("triton", "sdpa"):
            _say_that_tangents_are_slow()
        q, k, v, _, _, _, extras = _kept(ctx)
        directions = (torch.zeros_like(x) if t is None else t for x, t in zip((q, k, v), tangents[:3], strict=True))
        rest = (*tangent_arguments(extras, ctx.options), tangents[-2], extras.q_shift)
        out_tangent = _Tangent.apply(q, k, v, *directions, *rest)
        # Nobody sees the other results, but floats among them have to have a tangent.
        return out_tangent, *(q.new_zeros(x, dtype=dtype) for x, dtype in ctx.others), None

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *_backward(ctx, grad_out)


@torch.compiler.disable(reason="torch.func and forward mode through 4-bit attention run outside of compiled code")
def attention_under_transforms(return_lse: bool, *inputs: Any) -> tuple[torch.Tensor, ...]:
    """`attention_forward` with every rule of `_Attention`."""
    return _Attention.apply(return_lse, *inputs)


@lru_cache
def _say_that_tangents_are_slow() -> None:
    logger.warning("qat_kernels: tangents (forward mode) are computed by the eager implementation: same numbers, but slow.")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    q, k, v, *_ = inputs
    extras, options = extras_and_options(inputs)
    ctx.save_for_backward(*_needed_again(q, k, v, options), *_keep(ctx, k, extras, options, output))


def _backward(ctx: Any, grad_out: torch.Tensor, *_: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    *grads, grad_sinks = _gradient(ctx, grad_out)
    return *grads, *(None,) * 14, grad_sinks, None


def _needed_again(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Which of Q, K and V the backward reads."""
    value = v if options.reads_value else None
    return (q, k, value) if options.reads_query else (None, None, value)


def _keep(
    ctx: Any, k: torch.Tensor, extras: Extras, options: Options, results: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Sets what a derivative needs and is no tensor; returns the tensors that are to be saved behind Q, K and V."""
    out, out_hp, _, stats, codes = results
    if not options.has_out_hp:
        out_hp = out  # nothing of P or V was rounded, so O is O'
    ctx.options, ctx.key_shape = options, k.shape
    ctx.max_seqlens = (0, 0) if extras.packing is None else extras.packing[2:]
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    return (out_hp, stats, codes) if extras is NO_EXTRAS else (out_hp, stats, codes, *extras.tensors)


def _kept(ctx: Any) -> tuple[Any, ...]:
    """What was saved: Q, K, V, O', stats, codes, and the `Extras`."""
    q, k, v, out_hp, stats, codes, *tensors = ctx.saved_tensors
    return q, k, v, out_hp, stats, codes, Extras.of(tensors, ctx.max_seqlens) if tensors else NO_EXTRAS


def _gradient(ctx: Any, grad_out: torch.Tensor, *, seen: bool = True) -> tuple[torch.Tensor | None, ...]:
    """That of Q, K, V and the sinks; by the op if somebody has to see it."""
    q, k, v, out_hp, stats, codes, extras = _kept(ctx)
    if not seen:
        results = ops.backward(grad_out, q, k, v, out_hp, stats, codes, ctx.key_shape, extras, ctx.options)
    else:
        gradient = _Gradient.apply if transformed() else attention_backward
        rest = backward_arguments(ctx.key_shape, extras, ctx.options)
        results = gradient(grad_out, q, k, v, out_hp, stats, codes, *rest)
    *grads, grad_sinks = results
    return *grads, None if extras.sinks is None else grad_sinks


attention_forward.register_autograd(_backward, setup_context=_setup_context)
for _derivative in (attention_backward, attention_tangent):
    _derivative.register_autograd(_Once.backward)
