"""Compact masks of 4-bit attention in transformers: made with the host's positions, and turned back into the host's masks.

A causal mask says three things: which keys are filled, which of them are padding, and which rows are needed. A compact mask says
them with a shape like that of the host's mask, [batch, 3, queries, filled], and stores almost nothing: its last row is that of
the last filled key (so the host may keep only the last rows), and the dtype says what it holds. The 3 makes code that does not
know such masks fail instead of being silently wrong: masks have one head or as many as attention. For a sliding window it is 3
plus the width of the window.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from qat_kernels.spec import GROUP_SIZE

_MARK = 3
PLAIN = torch.int8
"""The dtype of a mask without padding. It holds one element."""
PADDED = torch.uint8
"""The dtype of a mask with padding. It holds booleans [batch, keys], the same for all queries."""
SAMPLES = torch.int32
"""The dtype of a mask for packed samples. It holds sample numbers [batch, keys], the same for all queries."""
CHUNKS = torch.int64
"""The dtype of a mask for chunks of tokens that see only each other. It holds chunk numbers [batch, keys], as for samples."""
BLOCKS = torch.uint64
"""The dtype of a mask with blocks of tokens that see each other both ways (images). It holds [batch, keys]: the last key that
each token sees, plus 1; 0 for padding."""
PADDING = -1
"""The chunk number of padding."""
_COMPACT = frozenset({PLAIN, PADDED, SAMPLES, CHUNKS, BLOCKS})
BEFORE_A_WINDOW = 3 * GROUP_SIZE - 2
"""How many keys are needed before a window, unless the first key is there: the rest of the group that the window begins in, a
whole group that no query sees, and the rest of another group. Groups count from the first token, and the first group of all
keys stays in high precision if a query sees it; with these keys both are the same as without a cache."""


class Causal(NamedTuple):
    """The content of a compact mask."""

    filled: int
    """How many keys are filled; the keys behind them are empty slots. The last query belongs to the last filled key."""
    key_mask: torch.Tensor | None = None
    """bool [batch, filled], True where a key may be seen; None: all of them."""
    documents: torch.Tensor | None = None
    """[batch, filled]: the number of each token's sample or chunk; None: each row is one."""
    window: int | None = None
    """How many keys a query sees, including its own; None: all before it."""
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None
    """int32 [batch, queries]: the first and the last key that each query sees, if attention is not simply causal."""


class _Kind(NamedTuple):
    """The content of a mask function, if it has no other parts."""

    window: int | None = None
    chunk: tuple[int, torch.Tensor] | None = None
    """Tokens per chunk, and the number of left padding tokens [B]."""
    samples: torch.Tensor | None = None
    """[B, L]"""
    positions: torch.Tensor | None = None
    """[B, L]: positions in each of several samples, if transformers counts by them."""
    blocks: torch.Tensor | None = None
    """[B, L]: the number of each token's block, -1 for tokens outside blocks."""


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
    """transformers' mask interface: a compact mask if it is causal; else the mask of `original`, which patched modules refuse."""
    from transformers.utils.import_utils import is_cuda_stream_capturing

    kind = _kind_of(mask_function, kwargs)
    first_query = int(q_offset)
    filled = first_query + q_length - kv_offset
    if kind is None or kv_length < filled or not _has_what_is_needed(kind, first_query, filled, kv_offset, attention_mask):
        arguments = {"mask_function": mask_function, "attention_mask": attention_mask} | kwargs
        made = _host_mask(original, batch_size, q_length, kv_length, q_offset, kv_offset, **arguments)
        # No mask means causal (or a window that holds all keys), but the host does not say where the queries are.
        if made is not None or q_length == 1 or kv_offset or kv_length < filled or not kwargs.get("allow_is_causal_skip", True):
            return made
        kind, attention_mask = _Kind(), None
    shape = (batch_size, _MARK + (kind.window or 0), q_length, filled)
    if kind.chunk is not None and first_query + q_length > kind.chunk[0]:
        chunks = _chunks(kind, filled, kv_offset, attention_mask)
        return chunks.to(CHUNKS)[:, None, None].expand(shape)
    if kind.samples is not None:
        return kind.samples.to(SAMPLES)[:, None, None].expand(shape)
    allowed = None
    if attention_mask is not None:
        attention_mask = attention_mask[:batch_size].bool()
        seen = kv_offset + filled
        allowed = torch.nn.functional.pad(attention_mask, (0, max(0, seen - attention_mask.shape[1])))[:, :seen]
    if kv_offset:
        allowed = _from_whole_groups(batch_size, allowed, kv_offset, filled, kwargs.get("device"))
    if kind.blocks is not None:
        last = _last_of_block(kind.blocks[:batch_size, kv_offset : kv_offset + filled])
        last = last + 1 if allowed is None else torch.where(allowed, last + 1, 0)
        return last.to(BLOCKS)[:, None, None].expand(shape)
    if allowed is not None and (torch.compiler.is_compiling() or is_cuda_stream_capturing() or kv_offset or not allowed.all()):
        return allowed.to(PADDED)[:, None, None].expand(shape)
    return torch.empty(1, 1, 1, 1, dtype=PLAIN, device=kwargs.get("device")).expand(shape)


def _has_what_is_needed(kind: _Kind, first_query: int, filled: int, kv_offset: int, attention_mask: torch.Tensor | None) -> bool:
    """Whether the keys begin early enough for 4-bit attention, and padding is on one side."""
    if kind.chunk is not None and attention_mask is not None and not torch.compiler.is_compiling():
        # padding on both sides, which is not supported, has a third change
        holes = attention_mask.int().diff(dim=-1).abs().sum(-1) > 2 - attention_mask[:, 0].int()
        if holes.any():
            return False
    if kind.blocks is not None and not (kind.blocks.shape[1] >= kv_offset + filled and _are_runs(kind.blocks)):
        return False
    if not kv_offset:
        return True
    if kind.blocks is not None and (kind.blocks[:, first_query:] >= 0).any():
        return False  # a block may begin before the keys do
    if kind.window is not None:
        return first_query - kind.window + 1 - kv_offset >= BEFORE_A_WINDOW
    return kind.chunk is not None


def _from_whole_groups(
    batch: int, allowed: torch.Tensor | None, kv_offset: int, filled: int, device: torch.device | None
) -> torch.Tensor:
    """[batch, filled]: the keys from the first whole group on. Groups count from the first token that is not padding."""
    position = torch.arange(kv_offset, kv_offset + filled, device=device)
    if allowed is None:
        return (position >= -(-kv_offset // GROUP_SIZE) * GROUP_SIZE).expand(batch, -1)
    leftpad = (allowed.cumsum(-1) == 0).sum(-1, keepdim=True)
    return allowed[:, kv_offset:] & (position >= kv_offset + (leftpad - kv_offset) % GROUP_SIZE)


def _are_runs(blocks: torch.Tensor) -> bool:
    """Whether the tokens of every block are contiguous, so that each query sees an interval."""
    begins = torch.nn.functional.pad(blocks, (1, 0), value=-1).diff(dim=-1) != 0
    return all(
        len(numbers := row[begin & (row >= 0)]) == len(numbers.unique()) for row, begin in zip(blocks, begins, strict=True)
    )


def _last_of_block(blocks: torch.Tensor) -> torch.Tensor:
    """[B, L]: the last token of each token's block, or the token itself."""
    position = torch.arange(blocks.shape[1], device=blocks.device).expand_as(blocks)
    goes_on = torch.nn.functional.pad((blocks[:, 1:] == blocks[:, :-1]) & (blocks[:, 1:] >= 0), (0, 1))
    # The next token at which its block ends.
    ends = torch.where(goes_on, blocks.shape[1], position)
    return ends.flip(-1).cummin(-1).values.flip(-1)


def _chunks(kind: _Kind, filled: int, kv_offset: int, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, filled]: the number of each token's chunk, PADDING for left padding."""
    assert kind.chunk is not None
    size, leftpad = kind.chunk
    position = torch.arange(kv_offset, kv_offset + filled, device=leftpad.device) - leftpad[:, None]
    if kind.samples is not None and kind.positions is not None:
        return kind.samples * (filled // size + 1) + kind.positions // size
    return torch.where(position < 0, PADDING, position // size)


def is_compact(mask: Any) -> bool:
    """Whether this is a compact mask."""
    return isinstance(mask, torch.Tensor) and mask.dtype in _COMPACT and mask.ndim == 4 and mask.shape[1] >= _MARK


def documents_of(mask: torch.Tensor | None) -> torch.Tensor | None:
    """[batch, keys]: the number of each token's sample or chunk; None if the mask has none."""
    return mask[:, 0, 0] if mask is not None and is_compact(mask) and mask.dtype in (SAMPLES, CHUNKS) else None


def read(mask: torch.Tensor | None, queries: int, keys: int, *, from_the_first: bool) -> Causal:
    """The content of a mask for these numbers of queries and keys. No mask means causal, if there are as many keys, or one query.

    Args:
        from_the_first: whether the first key that a query may see is the first of its sequence, as without windows and chunks.
            Then any mask for one query is a key mask.

    Raises:
        ValueError: it is not a causal mask, or is for other queries or keys.
    """
    if mask is None:
        if queries not in (1, keys):
            raise ValueError(
                f"no mask for {queries} queries and {keys} keys: expected one that says where the queries are; the model has to "
                "make it with transformers' create_causal_mask"
            )
        return Causal(keys)
    if not is_compact(mask):
        if from_the_first and queries == 1 and mask.dtype == torch.bool and mask.shape[1:] == (1, 1, keys):
            return Causal(keys, mask[:, 0, 0])
        raise ValueError(
            f"unsupported mask {mask.dtype} {tuple(mask.shape)}: expected causal attention with an "
            "optional padding mask [batch, keys], a sliding window, chunks of tokens or packed samples; other 4D masks are not "
            "supported, nor a cache that has dropped tokens before 4-bit attention saw them, nor a static one whose window "
            "slides (inside torch.compile pass attention_mask, or cu_seq_lens_q and what goes with it if samples are packed: "
            "transformers cannot look at position_ids there, and masks as if they were)"
        )
    _, marked, rows, filled = mask.shape
    window = marked - _MARK or None
    if rows != queries or filled > keys:
        raise ValueError(
            f"the mask of the model is for {rows} queries and {filled} keys, attention was asked for {queries} "
            f"and {keys}; exclude this module from the patch"
        )
    if mask.dtype == PADDED:
        by_key = mask[:, 0, 0]
        # The same, but torch.compile turns no bytes into booleans on every device.
        return Causal(filled, by_key != 0 if torch.compiler.is_compiling() else by_key.view(torch.bool), None, window)
    if mask.dtype == BLOCKS:
        return _between_bounds(mask[:, 0, 0].long(), queries, window)
    return Causal(filled, None, documents_of(mask), window)


def _between_bounds(numbers: torch.Tensor, queries: int, window: int | None) -> Causal:
    """The content of a mask with blocks. Rows of padding see no key, and get bounds that never decrease."""
    upper = (numbers - 1).cummax(-1).values
    position = torch.arange(numbers.shape[1], device=numbers.device).expand_as(numbers)
    lower = torch.zeros_like(position) if window is None else (position - window + 1).clamp(min=0)
    lower, upper = (x[:, -queries:].int().contiguous() for x in (lower, upper))
    return Causal(numbers.shape[1], numbers > 0, None, window, (lower, upper))


def restore(mask: Any, original: str, keys: int | None, dtype: torch.dtype) -> Any:
    """The mask that the host would make for an attention implementation. Masks that are not compact stay as they are.

    Args:
        keys: the number of keys, including the empty slots of a static cache; None: there are no empty slots.
    """
    from transformers import masking_utils

    if not is_compact(mask):
        return mask
    batch, _, queries, filled = mask.shape
    keys = filled if keys is None else keys
    causal = read(mask, queries, keys, from_the_first=False)
    function, padding, can_skip = masking_utils.causal_mask_function, causal.key_mask, queries > 1 or filled == keys
    if causal.window is not None:
        function = masking_utils.sliding_window_causal_mask_function(causal.window)
    if causal.bounds is not None:
        last = mask[:, 0, 0].long()
        same = torch.nn.functional.pad((last[:, 1:] == last[:, :-1]) & (last[:, 1:] > 0), (1, 1))
        in_blocks = torch.where(same[:, 1:] | same[:, :-1], last, -1)
        blocks = torch.nn.functional.pad(in_blocks, (0, keys - filled), value=-1)
        function, can_skip = masking_utils.causal_mask_function, False
        function = masking_utils.or_masks(function, masking_utils.blockwise_overlay(blocks))
        if causal.window is not None:
            function = masking_utils.and_masks(function, masking_utils.sliding_window_overlay(causal.window))
    if causal.documents is not None:
        documents = torch.nn.functional.pad(causal.documents, (0, keys - filled), value=PADDING)
        function = masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(documents))
        padding, can_skip = documents != PADDING, False
    kwargs = {"dtype": dtype, "device": mask.device, "allow_is_causal_skip": can_skip, "attention_mask": padding}
    kwargs |= {"mask_function": function, "local_size": causal.window}
    return _host_mask(original, batch, queries, keys, filled - queries, 0, **kwargs)


def _host_mask(original: str, batch: int, queries: int, keys: int, q_offset: Any, kv_offset: int, **kwargs: Any) -> Any:
    """The host's mask for `original`; None for an implementation without masks."""
    from transformers import AttentionMaskInterface

    sizes = {"batch_size": batch, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset}
    make = AttentionMaskInterface().get(original)
    return None if make is None else make(**sizes, **kwargs)


def _kind_of(mask_function: Callable, arguments: dict[str, Any]) -> _Kind | None:
    """The content of a mask function; None if it is more than causal attention, with a window, in chunks or inside samples.

    Transformers passes this in no other way. It is read from the function only if that is built of exactly the known parts;
    anything else becomes a full mask, which 4-bit attention refuses.
    """
    from transformers.masking_utils import causal_mask_function

    if mask_function is causal_mask_function:
        return None if arguments.get("local_size") is not None else _Kind()
    if torch.compiler.is_compiling():
        # It cannot be looked into here. Nothing was added to it: a window or chunks; `attention_forward` asks the module which.
        local, plain = arguments.get("local_size"), arguments.get("allow_is_causal_skip") and not arguments.get("use_vmap")
        return _Kind(window=local) if local is not None and plain else None
    samples = positions = None
    parts = _parts(mask_function, "and_masks")
    if len(parts) == 2 and set(found := _closed_over(parts[1])) == {"packed_sequence_mask"}:
        mask_function, samples = parts[0], found["packed_sequence_mask"]
    # Multimodal models have blocks of tokens that see each other, and -1 for tokens outside blocks, such as all plain text. A
    # window also cuts blocks, if it is combined with them.
    parts, window, blocks = _parts(mask_function, "and_masks"), None, None
    if len(parts) == 2 and (window := _window_of_overlay(parts[1])) is not None:
        mask_function = parts[0]
    parts = _parts(mask_function, "or_masks")
    if len(parts) == 2 and set(found := _closed_over(parts[1])) == {"block_sequence_ids"}:
        mask_function, blocks = parts[0], found["block_sequence_ids"]
        blocks = None if (blocks < 0).all() else blocks
    # Transformers 5.17 has the causal function here; later versions have one that counts positions in every sample.
    if samples is not None and set(remapped := _closed_over(mask_function)) == {"mask_function", "position_ids"}:
        mask_function, positions = remapped["mask_function"], remapped["position_ids"]
    if mask_function is causal_mask_function:
        return None if blocks is not None and samples is not None else _Kind(window=window, samples=samples, blocks=blocks)
    parts = _parts(mask_function, "and_masks")
    if len(parts) != 2 or parts[1] is not causal_mask_function or blocks is not None or window is not None:
        return None
    if (window := _window_of_overlay(parts[0])) is not None:
        return _Kind(window=window, samples=samples)
    found = _closed_over(parts[0])
    if not _is_made_by("chunked_overlay", parts[0]) or set(found) != {"chunk_size", "left_padding"}:
        return None
    if samples is not None and positions is None:
        return None  # the function does not say which chunk a token is in
    return _Kind(chunk=(found["chunk_size"], found["left_padding"]), samples=samples, positions=positions)


def _window_of_overlay(mask_function: Callable) -> int | None:
    """The width of a mask function's window, if the function has no other part."""
    found = _closed_over(mask_function)
    is_one = _is_made_by("sliding_window_overlay", mask_function) and set(found) == {"sliding_window"}
    return found["sliding_window"] if is_one else None


def _is_made_by(name: str, mask_function: Callable) -> bool:
    """Whether this mask function was made by the transformers function of this name."""
    return getattr(mask_function, "__qualname__", "").startswith(f"{name}.")


def _parts(mask_function: Callable, combination: str) -> tuple[Callable, ...]:
    """The functions in one of transformers' combinations of mask functions."""
    if not _is_made_by(combination, mask_function):
        return ()
    return _closed_over(mask_function).get("mask_functions", ())


def _closed_over(function: Callable) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}
