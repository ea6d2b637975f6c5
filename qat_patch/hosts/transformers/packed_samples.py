"""Packed samples of Transformers: several in a row, told apart by position_ids that restart.

Transformers finds them itself and asks for a mask that adds their borders to causality. Kept compact, that mask is the number of
every token's sample, int32 [B, 1, 1, L]; 4-bit attention takes it as a packed sequence of B * L tokens.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch

from qat_patch.layer import AttentionCall

_HINT = "position_ids that restart with every sample, no attention_mask, and use_cache=False"


def compact(mask_function: Callable, causal_mask_function: Callable) -> torch.Tensor | None:
    """The samples of a mask function, int32 [B, 1, 1, L]; None if it says anything but causal inside of samples.

    Transformers does not hand them over otherwise. They are read from its function only if this is made of exactly the known
    parts; what is unknown becomes a full mask, which 4-bit attention refuses.
    """
    if torch.compiler.is_compiling():
        return None
    parts = _closed_over(mask_function).get("mask_functions", ())
    if len(parts) != 2:
        return None
    causal, borders = parts
    # Transformers 5.17 has the causal function itself here, later versions one that counts positions in every sample.
    if set(remapped := _closed_over(causal)) == {"mask_function", "position_ids"}:
        causal = remapped["mask_function"]
    if causal is not causal_mask_function or set(found := _closed_over(borders)) != {"packed_sequence_mask"}:
        return None
    return found["packed_sequence_mask"].int()[:, None, None]


def _closed_over(function: Callable) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}


def is_compact(mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether this is what `compact` returned."""
    return mask is not None and mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


def expand(samples: torch.Tensor) -> torch.Tensor:
    """The full mask, bool [B, 1, L, L], True where a query may see a key."""
    return (samples == samples.mT).tril()


def check(query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """That masks, position_ids and cu_seq_lens tell the same samples. Reads them, so once a forward pass is enough.

    Raises:
        ValueError: they do not, or transformers has made no mask of positions that restart, as it does with a cache, and each
            sample would attend to those before it.
    """
    if torch.compiler.is_compiling() or query.shape[2] == 1:
        return
    positions, cu_seq_lens = kwargs.get("position_ids"), [kwargs.get(f"cu_seq_lens_{name}") for name in "qk"]
    samples = torch.zeros_like(query[:, 0, :, 0], dtype=torch.int32)
    if is_compact(mask):
        samples = samples + mask[:, 0, 0]
    if positions is not None and (mask is None or is_compact(mask)):
        found = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        if not torch.equal(found.int().expand_as(samples), samples):
            raise ValueError(f"4-bit attention: position_ids restart inside a row (packed samples), which needs {_HINT}")
    for name, given in zip("qk", cu_seq_lens, strict=True):
        if given is not None and not torch.equal(given.to(samples), _boundaries(samples)):
            raise ValueError(
                f"4-bit attention: cu_seq_lens_{name} must cut the tokens where position_ids do: expected "
                f"{_boundaries(samples).tolist()}, got {given.tolist()}; packed samples need {_HINT}"
            )


def packing(query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The keywords of `qat_kernels.attention` for packed samples; None if every row is one sample.

    cu_seq_lens and max_length are taken as they are given, as for FlashAttention; without them the mask is read, which waits for
    the GPU in every layer. `torch.compile` cannot do that: there transformers always asks for a mask of borders, and they
    tell whether there are any.

    Raises:
        ValueError: cu_seq_lens are given for samples that transformers has not told apart.
    """
    given = [kwargs.get(name) for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")]
    if given[0] is None and given[1] is None:
        if not is_compact(mask):
            return None
        boundaries = _boundaries(mask[:, 0, 0])
        longest = int(boundaries.diff().max())
        given = [boundaries, boundaries, longest, longest]
    elif not is_compact(mask):
        if mask is None and all(x is not None and len(x) == len(query) + 1 for x in given[:2]):
            return None
        if mask is None or not torch.compiler.is_compiling() or mask.shape[2] != query.shape[2]:
            raise ValueError(f"4-bit attention: cu_seq_lens_q and cu_seq_lens_k: packed samples need {_HINT}")
    cu_seqlens = (x if x is None else x.int() for x in given[:2])
    return dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*cu_seqlens, *given[2:]), strict=True))


def split(call: AttentionCall, packing: dict[str, Any]) -> Iterator[AttentionCall]:
    """A call of its own for every packed sample."""
    length = call.query.shape[2]
    for start, stop in itertools.pairwise(packing["cu_seqlens_q"].tolist()):
        row, first = divmod(start, length)
        tensors = {name: getattr(call, name) for name in ("query", "key", "value", "out")}
        parts = {name: x[row : row + 1, :, first : first + stop - start] for name, x in tensors.items()}
        yield dataclasses.replace(call, **parts)


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] -> [B * L, H, D]; a view where the rows lie one after the other in memory, as a projection leaves them."""
    return x.transpose(1, 2).flatten(0, 1)


def _boundaries(samples: torch.Tensor) -> torch.Tensor:
    """[B, L] -> int32 [samples + 1]: where each begins in the rows one after the other, and the end."""
    starts = torch.ones_like(samples, dtype=torch.bool)
    starts[:, 1:] = samples.diff(dim=1) != 0
    return torch.nn.functional.pad(starts.flatten().nonzero().squeeze(1), (0, 1), value=samples.numel()).int()
