"""SageAttention3's smoothing of Q and K (docs/NUMERICS.md, section 9): K without its mean, Q without those of blocks of 128 rows.

What the means of Q take from the scores, a number for each block and key, is added to them again. All of it is rounded where the
server rounds: to the 16 bits of its inputs, bfloat16 here for inputs of other dtypes. Matrix products are without autocast.

Shapes: B batch, H heads, N = ceil(Lq / 128) blocks, D head dim.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .spec import SMOOTH_BLOCK


class Smoothed(NamedTuple):
    """Q and K as they are quantized, and what is added to their scores."""

    query: torch.Tensor
    """[B, H, Lq, D]: Q less its means."""
    key: torch.Tensor
    """[B, H, Lk, D]: K less its mean."""
    query_mean: torch.Tensor
    """[B, H, N, D]."""
    scores: torch.Tensor
    """float32 [B, H, N, Lk]: the scores of the means."""


def smooth(query: torch.Tensor, key: torch.Tensor) -> Smoothed:
    """Q and K [B, H, L, D] smoothed. A last, shorter block of queries counts as one of 128, as if zeros followed."""
    dtype = query.dtype if query.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    with _no_autocast(query):
        query, key = query.to(dtype), key.to(dtype)
        key = key - key.mean(-2, keepdim=True)
        mean = block_sums(query.float()) / SMOOTH_BLOCK
        query_mean = mean.to(dtype)
        query = (query.float() - per_row(mean, query.shape[-2])).to(dtype)
        return Smoothed(query, key, query_mean, (query_mean @ key.mT).float())


def block_sums(x: torch.Tensor) -> torch.Tensor:
    """[..., Lq, n] -> [..., N, n]: the sums over blocks of 128 rows."""
    padded = F.pad(x, (0, 0, 0, -x.shape[-2] % SMOOTH_BLOCK))
    return padded.unflatten(-2, (-1, SMOOTH_BLOCK)).sum(-2)


def per_row(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[..., N, n] -> [..., Lq, n]: what each of `rows` rows gets of its block's."""
    return x.repeat_interleave(SMOOTH_BLOCK, dim=-2)[..., :rows, :]


def grad_query(grad: torch.Tensor, grad_score_sums: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """dQ through the smoothing.

    Args:
        grad: the gradient of `Smoothed.query`, [..., Lq, D].
        grad_score_sums: that of `Smoothed.scores`, which is dS summed over blocks, [..., N, Lk].
        key: `Smoothed.key` in the dtype of `grad`, [..., Lk, D].
    """
    with _no_autocast(grad):
        of_means = (grad_score_sums @ key - block_sums(grad)) / SMOOTH_BLOCK
        return grad + per_row(of_means, grad.shape[-2])


def grad_key(grad: torch.Tensor, grad_score_sums: torch.Tensor, query_mean: torch.Tensor) -> torch.Tensor:
    """dK through the smoothing; its own mean gets nothing, for every row of dS sums to zero. Arguments as in `grad_query`."""
    with _no_autocast(grad):
        return grad + grad_score_sums.mT @ query_mean


def _no_autocast(x: torch.Tensor) -> AbstractContextManager[object]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # "meta" has none
