"""Packed sequences: documents one after the other along the tokens, each attended to as if it were alone.

The layout is that of FlashAttention's varlen functions: q [total, H, D], and cu_seqlens, int32 [documents + 1] on its device,
with the first token of every document and the total at the end. In eager PyTorch every document goes through reference.py by
itself, so that groups along tokens start anew and nothing passes from one to another.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from . import reference
from .spec import QuantSpec


class Packing(NamedTuple):
    """Where the documents lie among the queries and among the keys."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    """At least the length of the longest document: what a kernel sizes its grid by."""
    max_seqlen_k: int

    def check_arguments(self, total_q: int, total_k: int, device: torch.device) -> None:
        """Everything that can be checked without reading `cu_seqlens`, which on a GPU would wait for it.

        Raises:
            ValueError: an argument is missing or has the wrong type, shape, dtype or device, or there are more tokens than
                documents of this length hold.
        """
        missing = [name for name, value in zip(self._fields, self, strict=True) if value is None]
        if missing:
            raise ValueError(
                f"attention: packed sequences: expected {', '.join(self._fields)}, all four; missing: {', '.join(missing)}"
            )
        for name, x in (("cu_seqlens_q", self.cu_seqlens_q), ("cu_seqlens_k", self.cu_seqlens_k)):
            if not isinstance(x, torch.Tensor) or x.ndim != 1 or len(x) < 1 or (x.dtype, x.device) != (torch.int32, device):
                got = f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, torch.Tensor) else repr(x)
                raise ValueError(f"attention: {name}: expected torch.int32 [documents + 1] on {device}, got {got}")
        if len(self.cu_seqlens_q) != len(self.cu_seqlens_k):
            raise ValueError(
                "attention: cu_seqlens_q and cu_seqlens_k: expected the same number of documents, got "
                f"{len(self.cu_seqlens_q) - 1} and {len(self.cu_seqlens_k) - 1}"
            )
        documents = len(self.cu_seqlens_q) - 1
        for name, length, total in (("max_seqlen_q", self.max_seqlen_q, total_q), ("max_seqlen_k", self.max_seqlen_k, total_k)):
            if not isinstance(length, int | torch.SymInt) or isinstance(length, bool) or length < 0:
                raise ValueError(f"attention: {name}: expected an int, the length of the longest document, got {length!r}")
            if documents * length < total:
                raise ValueError(
                    f"attention: {name}: expected the length of the longest document; {documents} documents of at most {length} "
                    f"cannot hold {total} tokens"
                )

    def documents(self, total_q: int, total_k: int) -> Iterator[tuple[slice, slice]]:
        """The queries and the keys of each document. Waits for the GPU if `cu_seqlens` is there.

        Raises:
            ValueError: the values of `cu_seqlens` do not cut all tokens into documents of at most `max_seqlen`.
        """
        queries = _slices("q", self.cu_seqlens_q.tolist(), total_q, self.max_seqlen_q)
        return zip(queries, _slices("k", self.cu_seqlens_k.tolist(), total_k, self.max_seqlen_k), strict=True)


def lse_shape(query: torch.Size, packing: Packing | None) -> tuple[int, ...]:
    """[B, H, Lq], or [H, total] of packed sequences."""
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
    packing: Packing,
    *,
    spec: QuantSpec,
    causal: bool,
    scale: float,
    with_twin: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.forward` of every document: O, O' (empty unless `with_twin`) as `query`, and LSE [H, total]."""
    out = torch.empty_like(query)
    twin = torch.empty_like(query) if with_twin else query.new_empty(0)
    lse = query.new_empty((query.shape[1], query.shape[0]), dtype=reference.accumulator(query.dtype))
    options = {"spec": spec, "causal": causal, "scale": scale, "with_twin": with_twin}
    for rows, keys in packing.documents(len(query), len(key)):
        alone = (_alone(query, rows), _alone(key, keys), _alone(value, keys))
        out_alone, twin_alone, lse_alone = reference.forward(*alone, None, k_shift, **options)
        _alone(out, rows).copy_(out_alone)
        if with_twin:
            _alone(twin, rows).copy_(twin_alone)
        lse[:, rows] = lse_alone[0]
    return out, twin, lse


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    twin: torch.Tensor,
    k_shift: torch.Tensor | None,
    packing: Packing,
    *,
    spec: QuantSpec,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`reference.backward` of every document: dQ, dK, dV in the shapes and dtypes of the inputs, contiguous."""
    grads = tuple(x.new_empty(x.shape) for x in (query, key, value))
    for rows, keys in packing.documents(len(query), len(key)):
        places = (rows, keys, keys)
        alone = (_alone(x, place) for x, place in zip((query, key, value), places, strict=True))
        grads_alone = reference.backward(
            _alone(grad_out, rows), *alone, _alone(twin, rows), None, k_shift, spec=spec, causal=causal, scale=scale
        )
        for grad, place, grad_alone in zip(grads, places, grads_alone, strict=True):
            _alone(grad, place).copy_(grad_alone)
    return grads


def _alone(x: torch.Tensor, tokens: slice) -> torch.Tensor:
    """A view of one document of [total, H, D] as a batch of one, [1, H, L, D]."""
    return x[tokens].transpose(0, 1)[None]
