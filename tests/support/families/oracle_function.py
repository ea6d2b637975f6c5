"""The float64 oracle as a function with a gradient, to stand in for the attention of a whole model."""

import torch

from support.kernels import oracle


class OracleAttention(torch.autograd.Function):
    """The forward of the oracle, with the gradient by the formulas of docs/NUMERICS.md, section 5."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, options):
        ctx.save_for_backward(query, key, value, sinks)
        ctx.options = options
        return oracle.attention(query, key, value, sinks=sinks, **options)["out"]

    @staticmethod
    def backward(ctx, grad):
        *inputs, sinks = ctx.saved_tensors
        found = oracle.backward(*inputs, grad, sinks=sinks, **ctx.options)
        grads = [gradient.to(x.dtype) for gradient, x in zip(found, (*inputs, sinks), strict=sinks is not None)]
        return *grads, *[None] * (5 - len(grads))


def oracle_attention(query, key, value, *, sinks=None, **options):
    """query [B, H, Lq, D], key and value [B, Hk, Lk, D] -> O, float64, with the keywords of the oracle."""
    return OracleAttention.apply(query, key, value, sinks, options)
