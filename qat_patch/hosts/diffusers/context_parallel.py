"""Context parallelism of Diffusers for 4-bit attention: every rank holds a part of the tokens, and all heads.

Ulysses exchanges tokens for heads, so that each rank has all tokens of some heads; ring gathers the keys and values of all ranks.
Both ways attention sees whole sequences, so the groups of V, and all results, are those of one process, however tokens are split.
Both are differentiable exchanges around the usual attention. Merging partial outputs, as ring attention usually does, is not
enough for training: the backward needs the high-precision twin O' of the whole row (docs/NUMERICS.md, section
5), and an output with its log-sum-exp does not carry it. Diffusers gathers all keys before its ring too, so that this costs no
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


def attend(
    attention: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shifts: dict[str, torch.Tensor],
    config: Any,
) -> torch.Tensor:
    """Attention over the tokens of all ranks.

    Args:
        attention: a function of query, key, value [B, H, L, D] and shifts.
        query, key, value: those of this rank, [B, L / ranks, H, D], self-attention.
        shifts: K and Q shifts for all heads, [H, D].
        config: diffusers' ContextParallelConfig.

    Returns:
        The output of this rank's tokens, like `query`.

    Raises:
        ValueError: tokens or heads cannot be split this way.
    """
    from diffusers.models.attention_dispatch import SeqAllToAllDim

    if config.ulysses_anything or config.ring_anything:
        raise ValueError(
            "4-bit attention: context parallelism: expected an equal number of tokens and heads on all ranks, got "
            "ulysses_anything or ring_anything; set them to False"
        )
    ulysses = config._ulysses_mesh.get_group() if config.ulysses_degree > 1 else None
    if ulysses is not None:
        ranks, heads = config.ulysses_degree, query.shape[2]
        if heads % ranks or key.shape[2] != heads:
            raise ValueError(
                f"4-bit attention: ulysses_degree: expected a divisor of the {heads} heads, and as many key heads, got {ranks} "
                f"and {key.shape[2]} key heads"
            )
        query, key, value = (SeqAllToAllDim.apply(ulysses, x, 2, 1) for x in (query, key, value))
        shifts = {which: shift.chunk(ranks)[dist.get_rank(ulysses)] for which, shift in shifts.items()}
    if config.ring_degree > 1:
        ring = config._ring_mesh.get_group()
        key, value = (_Gather.apply(x, ring) for x in (key, value))
    out = attention(*(x.transpose(1, 2) for x in (query, key, value)), shifts=shifts).transpose(1, 2)
    return out if ulysses is None else SeqAllToAllDim.apply(ulysses, out.contiguous(), 1, 2)


class _Gather(torch.autograd.Function):
    """The tokens of all ranks, in order. The backward sums the gradients of all ranks for this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        parts = [part.contiguous() for part in grad.chunk(dist.get_world_size(ctx.group), 1)]
        # An exchange, then a float32 sum in the order of the ranks: bit-equal from run to run.
        received = [torch.empty_like(parts[0]) for _ in parts]
        dist.all_to_all(received, parts, group=ctx.group)
        return torch.stack(received).sum(0, dtype=torch.float32).to(grad.dtype), None
