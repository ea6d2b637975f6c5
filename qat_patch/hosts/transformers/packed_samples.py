"""Packed samples of Transformers: several in one row, separated by position_ids that restart; and chunks of tokens.

Transformers finds samples itself and asks for a mask that adds their borders to causality. Kept compact (masks.py), that mask is
the number of every token's sample; 4-bit attention takes it as a packed sequence of B * L tokens. Chunks (Llama 4) are the same.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from qat_patch.layer import AttentionCall

from .masks import CHUNKS, PADDING, PLAIN, SAMPLES, documents_of, is_compact

_HINT = "position_ids that restart with every sample, no attention_mask, and use_cache=False"


class Checked:
    """The inputs that were checked in this forward pass. A model's layers share it, so that inputs are read only once.

    It also holds the model's position_ids: not all models pass them on to their layers.
    """

    def __init__(self, recurrent: str | None) -> None:
        self._recurrent = recurrent
        """A class of modules that carry a state from token to token, if the model has one."""
        self._positions: Callable[[], Any] = _nothing
        self._last: tuple[Callable[[], Any], ...] = ()

    def __reduce__(self) -> tuple[type[Checked], tuple[str | None]]:
        return Checked, (self._recurrent,)

    def begin(self, kwargs: dict[str, Any]) -> None:
        """Start a forward pass with these arguments."""
        self._positions, self._last = _reference(kwargs.get("position_ids")), ()

    def check(self, query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Check that masks, position_ids, cu_seq_lens and seq_idx describe the same samples; once for all layers with the same
        tensors.

        Raises:
            ValueError: they do not; or transformers has made no mask from positions that restart, as it does with a cache, so
                each sample would attend to earlier ones; or a recurrent module would take its state to the next sample.
        """
        recurrent = self._recurrent
        if recurrent is not None and kwargs.get("cu_seq_lens_q") is not None and len(kwargs["cu_seq_lens_q"]) > len(query) + 1:
            _refuse_recurrent(recurrent)
        from transformers.utils.import_utils import is_cuda_stream_capturing

        if torch.compiler.is_compiling() or is_cuda_stream_capturing() or query.shape[2] == 1:
            return  # the first two cannot wait for the GPU, which has the positions
        positions = kwargs.get("position_ids")
        inputs = (
            mask,
            self._positions() if positions is None else positions,
            *map(kwargs.get, ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")),
        )
        if self._last and all(last() is x for last, x in zip(self._last, inputs, strict=True)):
            return
        self._last = ()
        _check(query, *inputs)
        if recurrent is not None and mask is not None and mask.dtype == SAMPLES:
            samples = documents_of(mask)
            if samples is not None and samples.diff(dim=1).any():
                _refuse_recurrent(recurrent)
        self._last = tuple(map(_reference, inputs))


def _reference(x: Any) -> Callable[[], Any]:
    return weakref.ref(x) if isinstance(x, torch.Tensor) else _nothing


def _nothing() -> None:
    return None


def _check(query: torch.Tensor, mask: torch.Tensor | None, positions: Any, seq_idx: Any, *cu_seq_lens: Any) -> None:
    if mask is not None and mask.dtype == CHUNKS:
        return  # layers with full attention check it
    samples = torch.zeros_like(query[:, 0, :, 0], dtype=torch.int32)
    found = documents_of(mask)
    if found is not None and found.shape == samples.shape:
        samples = samples + found
    # Positions of padding may be anything; positions with several axes are places in pictures.
    by_position = mask is None or (is_compact(mask) and mask.dtype in (PLAIN, SAMPLES))
    if by_position and positions is not None and positions.shape[1:] == samples.shape[1:]:
        restarts = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        if not torch.equal(restarts.int().expand_as(samples), samples):
            raise ValueError(
                f"4-bit attention: position_ids restart inside a row (packed samples), which needs {_HINT}, and a model that "
                "separates samples by them; gpt-oss does not, without the patch either: give it each sample in a row of its own"
            )
    for name, given in zip("qk", cu_seq_lens, strict=True):
        if given is not None and not torch.equal(given.to(samples), _boundaries(samples)):
            _refuse(f"cu_seq_lens_{name}", samples, given.tolist())
    # The number of every token's sample, [B, L], which linear attention and convolutions of mixed models read.
    if seq_idx is not None and seq_idx.shape != samples.shape:
        _refuse("seq_idx", samples, f"shape {list(seq_idx.shape)}")
    if seq_idx is not None and not torch.equal(_boundaries(seq_idx), _boundaries(samples)):
        _refuse("seq_idx", samples, _boundaries(seq_idx).tolist())


def _refuse_recurrent(recurrent: str) -> NoReturn:
    # Whether `cu_seq_lens_q` and `seq_idx` reach such modules depends on transformers' version, the class and other packages.
    raise ValueError(
        f"4-bit attention: position_ids restart inside a row (packed samples), and the {recurrent} of this model may carry its "
        "state from one sample to the next; pass one sample a row"
    )


def _refuse(name: str, samples: torch.Tensor, got: object) -> NoReturn:
    raise ValueError(
        f"4-bit attention: {name} must cut the tokens where position_ids do: expected {_boundaries(samples).tolist()}, got "
        f"{got}; packed samples need {_HINT}"
    )


def packing(query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The keyword arguments of `qat_kernels.attention` for packed samples or chunks; None if every row is one.

    Given cu_seq_lens and max_length are used directly, as for FlashAttention; without them the mask is read, which waits for the
    GPU in every layer. `torch.compile` cannot do that: there transformers always asks for a mask of borders, and cu_seq_lens say
    whether there are any.

    Raises:
        ValueError: cu_seq_lens are given for samples that transformers has not separated.
    """
    given = [kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
    told = given[0] is not None or given[1] is not None
    if mask is not None and mask.dtype == CHUNKS and (chunks := documents_of(mask)) is not None:
        return _of_last_queries(chunks, query.shape[2])
    if not told and (mask is None or mask.dtype != SAMPLES):
        return None
    samples = documents_of(mask)
    if not told:
        if samples is None:
            return None
        if samples.shape[1] != query.shape[2]:
            raise ValueError(
                f"4-bit attention: expected queries of all {samples.shape[1]} tokens of packed samples, got {query.shape[2]}: "
                "the model keeps the last ones only; do not pass logits_to_keep"
            )
        boundaries = _boundaries(samples)
        longest = int(boundaries.diff().max())
        given = [boundaries, boundaries, longest, longest]
    elif samples is None:
        if (mask is None or (is_compact(mask) and mask.dtype == PLAIN)) and all(
            x is not None and len(x) == len(query) + 1 for x in given[:2]
        ):
            return None
        if mask is None or is_compact(mask) or not torch.compiler.is_compiling() or mask.shape[2] != query.shape[2]:
            raise ValueError(f"4-bit attention: cu_seq_lens_q and cu_seq_lens_k: packed samples need {_HINT}")
    cu_seqlens = (x if x is None else x.int() for x in given[:2])
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*cu_seqlens, *given[2:]), strict=True))


def split(call: AttentionCall, packing: dict[str, Any], mask: torch.Tensor | None) -> Iterator[AttentionCall]:
    """One call for every packed sample or chunk that has queries; none for padding."""
    numbers = documents_of(mask)
    bounds = (itertools.pairwise(packing[f"cu_seqlens_{side}"].tolist()) for side in "qk")
    for queries, keys in zip(*bounds, strict=True):
        row, first_key = divmod(keys[0], call.key.shape[2])
        if queries[0] == queries[1] or (numbers is not None and numbers[row, first_key] == PADDING):
            continue
        parts = {}
        for name, (start, stop) in {"query": queries, "out": queries, "key": keys, "value": keys}.items():
            x = getattr(call, name)
            row, first = divmod(start, x.shape[2])
            parts[name] = x[row : row + 1, :, first : first + stop - start]
        yield dataclasses.replace(call, **parts)


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] -> [B * L, H, D]; a view if the rows are contiguous in memory, as after a projection."""
    return x.transpose(1, 2).flatten(0, 1)


def _boundaries(samples: torch.Tensor) -> torch.Tensor:
    """[B, L] -> int32 [samples + 1]: where each sample begins in the flattened rows, and the end."""
    starts = torch.ones_like(samples, dtype=torch.bool)
    starts[:, 1:] = samples.diff(dim=1) != 0
    return torch.nn.functional.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=samples.numel()).int()


def _of_last_queries(documents: torch.Tensor, queries: int) -> dict[str, Any]:
    """The keyword arguments of `qat_kernels.attention` for the documents of [B, L] keys and the last queries of every row."""
    boundaries = _boundaries(documents)
    borders = torch.zeros(documents.numel() + 1, dtype=torch.int32, device=documents.device)
    borders[boundaries[:-1].long()] = 1
    number = (borders[:-1].cumsum(0) - 1).view_as(documents)[:, -queries:]
    counts = torch.bincount(number.flatten(), minlength=len(boundaries) - 1)
    cu_seqlens_q = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    longest = (int(x.diff().max()) for x in (cu_seqlens_q, boundaries))
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (cu_seqlens_q, boundaries, *longest), strict=True))
