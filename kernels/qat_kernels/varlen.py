"""Packed sequences: documents one after another along the tokens, each computed as if it were alone.

The layout is that of FlashAttention's varlen functions: q [total, H, D], and cu_seqlens, int32 [documents + 1] on its device,
with the first token of every document and the total at the end. In eager PyTorch every document goes through reference.py
separately, so that groups along tokens start again and documents do not affect each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from . import reference
from .mask import Mask
from .spec import QuantSpec


class Packing(NamedTuple):
    """The places of the documents among the queries and among the keys."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    """At least the length of the longest document. It sets the size of a kernel's grid."""
    max_seqlen_k: int

    def documents(self, total_q: int, total_k: int) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of each document. Waits for the GPU if `cu_seqlens` is there.

        Raises:
            ValueError: the values of `cu_seqlens` do not cut all tokens into documents of at most `max_seqlen`.
        """
        queries = _slices("q", self.cu_seqlens_q.tolist(), total_q, self.max_seqlen_q)
        return zip(queries, _slices("k", self.cu_seqlens_k.tolist(), total_k, self.max_seqlen_k), strict=True)


def lse_shape(query: torch.Size, packing: tuple[Any, ...] | None) -> tuple[int, ...]:
    """[B, H, Lq], or [H, total] of packed sequences, of which there is something."""
    return tuple(query[:3]) if packing is None else (query[1], query[0])


def _slices(name: str, bounds: list[int], total: int, longest: int) -> list[slice]:
    if bounds[0] != 0 or bounds[-1] != total:
        raise ValueError(
            f"attention: cu_seqlens_{name}: expected to start at 0 and to end at {total}, the number of tokens, "
            f"got {bounds[0]} and {bounds[-1]}"
        )
    slices = [slice(start, stop) for start, stop in pairwise(bounds)]
    for number, each in enumerate(slices):
        if not 0 <= each.stop - each.start <= longest:
            raise ValueError(
                f"attention: cu_seqlens_{name}: expected documents of 0 to max_seqlen_{name} = {longest} tokens, got "
                f"{each.stop - each.start} in document {number} (from {each.start} to {each.stop})"
            )
    return slices


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    packing: Packing,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    with_out_hp: bool,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.forward` of every document: O, O' (empty unless `with_out_hp`) as `query`, and LSE [H, total]."""
    out = reference.empty_out(query, value.shape[-1])
    out_hp = torch.empty_like(out) if with_out_hp else query.new_empty(0)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=reference.accumulator(query.dtype))
    for rows, keys in packing.documents(len(query), len(key)):
        q, k, v = _alone(query, rows), _alone(key, keys), _alone(value, keys)
        out_alone, out_hp_alone, lse_alone = reference.forward(
            q, k, v, None, k_shift, q_shift,
            spec=spec, mask=mask, scale=scale, with_out_hp=with_out_hp, softcap=softcap, sinks=sinks,
        )  # fmt: skip
        _alone(out, rows).copy_(out_alone)
        if with_out_hp:
            _alone(out_hp, rows).copy_(out_hp_alone)
        lse[:, rows] = lse_alone[0]
    return out, out_hp, lse


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out_hp: torch.Tensor,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    packing: Packing,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.backward` of every document: gradients in the shapes and dtypes of the inputs, contiguous."""
    options: dict[str, Any] = {"spec": spec, "mask": mask, "scale": scale, "softcap": softcap, "sinks": sinks}
    grad_sinks = query.new_empty(0) if sinks is None else torch.zeros_like(sinks, dtype=reference.accumulator(query.dtype))
    grad_query, grad_key, grad_value = (x.new_empty(x.shape) for x in (query, key, value))
    for rows, keys in packing.documents(len(query), len(key)):
        do, q, k, v = _alone(grad_out, rows), _alone(query, rows), _alone(key, keys), _alone(value, keys)
        dq, dk, dv, of_sinks = reference.backward(do, q, k, v, _alone(out_hp, rows), None, k_shift, q_shift, **options)
        grad_sinks += of_sinks
        _alone(grad_query, rows).copy_(dq)
        _alone(grad_key, keys).copy_(dk)
        _alone(grad_value, keys).copy_(dv)
    return grad_query, grad_key, grad_value, grad_sinks if sinks is None else grad_sinks.to(sinks.dtype)


def tangent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tangents: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    packing: Packing,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    sinks_tangent: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.tangent` of every document."""
    options: dict[str, Any] = {"spec": spec, "mask": mask, "scale": scale, "softcap": softcap}
    options |= {"sinks": sinks, "sinks_tangent": sinks_tangent}
    out = reference.empty_out(query, value.shape[-1])
    for rows, keys in packing.documents(len(query), len(key)):
        q, k, v = _alone(query, rows), _alone(key, keys), _alone(value, keys)
        dq, dk, dv = (_alone(x, where) for x, where in zip(tangents, (rows, keys, keys), strict=True))
        _alone(out, rows).copy_(reference.tangent(q, k, v, (dq, dk, dv), None, k_shift, q_shift, **options))
    return out


def _alone(x: torch.Tensor, tokens: slice) -> torch.Tensor:
    """A view of one document of [total, H, D] as a batch of one, [1, H, L, D]."""
    return x[tokens].transpose(0, 1)[None]
