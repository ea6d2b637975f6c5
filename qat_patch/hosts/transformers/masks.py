"""Masks of 4-bit attention in transformers: compact, with the positions that the host knows, and back to those of the host.

A causal mask says three things: which keys are filled, which of them are padding, and which of its rows are asked for. A compact
mask says them in a shape like that of the host's own mask, [batch, 3, queries, filled], and holds next to nothing: its last row
is that of the last filled key (so that hosts may keep the last rows only), and the dtype says what it holds. The 3 is there for
code that does not know such masks: it fails, and is not silently wrong, for no attention of 3 heads stands behind one of 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_MARK = 3
PLAIN = torch.int8
"""The dtype of a mask without padding. It holds one element."""
PADDED = torch.uint8
"""The dtype of a mask with padding. It holds [batch, keys] booleans, which differ along the keys only."""
SAMPLES = torch.int32
"""The dtype of a mask for packed samples. It holds [batch, keys] numbers of samples, which differ along the keys only."""
_COMPACT = frozenset({PLAIN, PADDED, SAMPLES})


class Causal(NamedTuple):
    """What a compact mask says."""

    filled: int
    """How many keys there are; those behind are empty slots. The last query is the last of them."""
    key_mask: torch.Tensor | None
    """bool [batch, filled], True where a key may be seen; None: all of them."""
    samples: torch.Tensor | None
    """int32 [batch, filled]: the number of every token's sample; None: each row is one sample."""


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    *,
    original: str = "sdpa",
    **kwargs: Any,
) -> Any:
    """transformers' mask interface: a compact mask if it is causal; else what `original` has, which patched modules refuse."""
    from transformers.masking_utils import causal_mask_function

    is_causal, samples = _simplify(mask_function, causal_mask_function)
    filled = int(q_offset) + q_length
    shape = (batch_size, _MARK, q_length, filled)
    # Keys may begin later than with the first token, or end before the last query: that is for the host.
    at_the_end = not kv_offset and kv_length >= filled
    if not is_causal or kwargs.get("local_size") is not None or not at_the_end:
        arguments = {"mask_function": mask_function, "attention_mask": attention_mask} | kwargs
        made = _host_mask(original, batch_size, q_length, kv_length, q_offset, kv_offset, **arguments)
        # Without a mask the host means a causal one (a window that all keys are in), but not where the queries are.
        if made is not None or q_length == 1 or not at_the_end or not kwargs.get("allow_is_causal_skip", True):
            return made
        samples = attention_mask = None
    if samples is not None:
        return samples.to(SAMPLES)[:, None, None].expand(shape)
    if attention_mask is not None:
        attention_mask = attention_mask[:batch_size].bool()
        padded = torch.nn.functional.pad(attention_mask, (0, max(0, filled - attention_mask.shape[1])))[:, :filled]
        if torch.compiler.is_compiling() or not padded.all():
            return padded.to(PADDED)[:, None, None].expand(shape)
    return torch.empty(1, 1, 1, 1, dtype=PLAIN, device=kwargs.get("device")).expand(shape)


def is_compact(mask: Any) -> bool:
    """Whether this is a compact mask."""
    return isinstance(mask, torch.Tensor) and mask.dtype in _COMPACT and mask.ndim == 4 and mask.shape[1] == _MARK


def samples_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """int32 [batch, keys]: the number of every token's sample; None if the mask tells none apart."""
    return mask[:, 0, 0] if mask is not None and is_compact(mask) and mask.dtype == SAMPLES else None


def read(mask: torch.Tensor | None, queries: int, keys: int) -> Causal:
    """What a mask says to so many queries and keys. No mask is causal if there are as many keys, or one query.

    Raises:
        ValueError: it is not a causal mask, or one of other queries or keys.
    """
    if mask is None:
        if queries not in (1, keys):
            raise ValueError(
                f"no mask for {queries} queries and {keys} keys: expected one that says where the queries are; the model has to "
                "make it with transformers' create_causal_mask"
            )
        return Causal(keys, None, None)
    if not is_compact(mask):
        if queries == 1 and mask.dtype == torch.bool and mask.shape[1:] == (1, 1, keys):  # to one query, any mask is of keys
            return Causal(keys, mask[:, 0, 0], None)
        raise ValueError(
            f"unsupported mask {mask.dtype} {tuple(mask.shape)}: expected causal attention with an "
            "optional padding mask [batch, keys], or packed samples; sliding windows and custom 4D masks are not supported yet "
            "(inside torch.compile pass attention_mask, or cu_seq_lens_q and what goes with it if samples are packed: "
            "transformers cannot look at position_ids there, and masks as if they were)"
        )
    _, _, rows, filled = mask.shape
    if rows != queries or filled > keys:
        raise ValueError(
            f"the mask of the model is for {rows} queries and {filled} keys, attention was asked for {queries} "
            f"and {keys}; exclude this module from the patch"
        )
    if mask.dtype == PADDED:
        by_key = mask[:, 0, 0]
        # The same, but torch.compile turns no bytes into booleans on every device.
        return Causal(filled, by_key != 0 if torch.compiler.is_compiling() else by_key.view(torch.bool), None)
    return Causal(filled, None, samples_of(mask))


def restore(mask: Any, original: str, keys: int | None, dtype: torch.dtype) -> Any:
    """The mask that the host would have made for an implementation of attention; other masks stay as they are.

    Args:
        keys: also counting the empty slots of a static cache behind those that are filled; None: there are none.
    """
    from transformers.masking_utils import and_masks, causal_mask_function, packed_sequence_mask_function

    if not is_compact(mask):
        return mask
    batch, _, queries, filled = mask.shape
    keys = filled if keys is None else keys
    causal = read(mask, queries, keys)
    function, can_skip = causal_mask_function, queries > 1 or filled == keys
    if causal.samples is not None:
        function, can_skip = and_masks(causal_mask_function, packed_sequence_mask_function(causal.samples)), False
    kwargs = {"dtype": dtype, "device": mask.device, "allow_is_causal_skip": can_skip, "attention_mask": causal.key_mask}
    return _host_mask(original, batch, queries, keys, filled - queries, 0, mask_function=function, **kwargs)


def _host_mask(original: str, batch: int, queries: int, keys: int, q_offset: Any, kv_offset: int, **kwargs: Any) -> Any:
    """What the host makes for `original`; nothing for one without masks, as it does."""
    from transformers import AttentionMaskInterface

    sizes = {"batch_size": batch, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset}
    make = AttentionMaskInterface().get(original)
    return None if make is None else make(**sizes, **kwargs)


def _simplify(mask_function: Callable, causal_mask_function: Callable) -> tuple[bool, torch.Tensor | None]:
    """Whether a mask function says nothing but causal, inside of samples if there are any; and the samples, [B, L].

    Transformers does not hand them over otherwise. They are read from its function only if this is made of exactly the known
    parts; what is unknown becomes a full mask, which 4-bit attention refuses.
    """
    if mask_function is causal_mask_function:
        return True, None
    if torch.compiler.is_compiling():
        return False, None
    samples = None
    parts = _parts(mask_function, "and_masks")
    if len(parts) == 2 and set(found := _closed_over(parts[1])) == {"packed_sequence_mask"}:
        mask_function, samples = parts[0], found["packed_sequence_mask"]
    # Multimodal models have blocks of tokens that see each other, -1 for tokens in none: in plain text all of them.
    parts = _parts(mask_function, "or_masks")
    blocks = _closed_over(parts[1]) if len(parts) == 2 else {}
    if set(blocks) == {"block_sequence_ids"} and (blocks["block_sequence_ids"] < 0).all():
        mask_function = parts[0]
    # Transformers 5.17 has the causal function itself here, later versions one that counts positions in every sample.
    if samples is not None and set(remapped := _closed_over(mask_function)) == {"mask_function", "position_ids"}:
        mask_function = remapped["mask_function"]
    return mask_function is causal_mask_function, samples


def _parts(mask_function: Callable, combination: str) -> tuple[Callable, ...]:
    """The functions that one of transformers' combinations of mask functions is made of."""
    if not getattr(mask_function, "__qualname__", "").startswith(f"{combination}."):
        return ()
    return _closed_over(mask_function).get("mask_functions", ())


def _closed_over(function: Callable) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}
