"""Translates the masks that diffusers passes to its dispatcher for 4-bit attention, and refuses those that it does not support.

The meaning of a mask must be read from its values, and on a GPU this waits for all work queued before. So each mask object is
read once: a forward pass gives one object to all its blocks. The result is dropped together with the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from qat_patch.layer import AttentionLayer

EXCLUDED = -9000.0
"""An additive mask excludes a key with at most this value; the usual values are -10000 (-9984 in bfloat16) and -inf."""


class Seen(NamedTuple):
    """Which keys the queries of a call see, in the form of `qat_kernels.attention`."""

    key_mask: torch.Tensor | None = None
    """bool [batch, keys], True where a key may be seen; None: all of them."""
    query_mask: torch.Tensor | None = None
    """bool [batch, queries], False where a query sees no key, so that its output is zero; None: all see some key."""
    causal: bool = False
    """Causal: the last query sees all keys of `key_mask`, and each earlier one sees one key less."""
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None
    """int32 [batch or 1, queries]: each query sees the keys of `key_mask` from the first bound to the second."""


_SEEN: Any = WeakTensorKeyDictionary()
"""For each mask object: its version when it was read, and the result."""


def read(layer: AttentionLayer, mask: torch.Tensor | None, batch: int, queries: int, keys: int) -> Seen:
    """The meaning of a mask, if 4-bit attention supports it.

    It may be boolean, or additive with 0 where a key may be seen and -10000 or less elsewhere. All heads must have the same.

    - A key mask: the same for all queries. Or the outer product of the tokens that are not padding: then padding sees nothing.
    - Causal, by single keys or by blocks (frames of a video), or a window: each query sees the keys from one bound to another,
      and neither bound ever decreases along the queries. The bounds are compared with the mask exactly. Inside torch.compile
      such a mask is refused, because values cannot be read there.

    Raises:
        ValueError: it is another mask.
    """
    if mask is None:
        return Seen()

    def refuse(got: str) -> None:
        refuse_call(
            layer,
            "attn_mask",
            f"a key mask [{batch}, 1, 1, {keys}] or [{batch}, {keys}], or [{batch}, 1, {queries}, {keys}] by which each query "
            "sees the keys from one bound to another, and bounds that never decrease: bool, True where a key may be seen, or "
            "float, 0 there and at most -10000 elsewhere",
            got,
            "exclude the modules that receive such masks from the patch",
        )

    if not isinstance(mask, torch.Tensor):
        refuse(f"a {type(mask).__name__} of flex attention" if type(mask).__name__ == "BlockMask" else repr(type(mask)))
    rows = mask[:, None, None] if mask.ndim == 2 else mask
    if rows.ndim != 4 or rows.shape[0] not in (1, batch) or rows.shape[2] not in (1, queries) or rows.shape[3] != keys:
        refuse(f"{mask.dtype} {tuple(mask.shape)}")
    if rows.dtype == torch.bool and rows.shape[2] == 1 and (rows.shape[1] == 1 or not rows.stride(1)):
        return Seen(rows[:, 0, 0].expand(batch, keys))  # nothing depends on the values of the mask
    seen = _in_a_graph(rows) if torch.compiler.is_compiling() else _read_once(mask, rows, refuse)
    key_mask, query_mask = (None if x is None else x.expand(batch, -1) for x in (seen.key_mask, seen.query_mask))
    return seen._replace(key_mask=key_mask, query_mask=query_mask)


def _read_once(mask: torch.Tensor, rows: torch.Tensor, refuse: Callable[[str], None]) -> Seen:
    """The meaning of the values: cached, unless the mask has been written to since.

    Nothing in the cache may be a view of the mask, which would keep it alive. Inference tensors do not record writes, so they
    are read again at each call.
    """
    version = None if mask.is_inference() else mask._version
    known = _SEEN.get(mask)
    if known is not None and version is not None and known[0] == version:
        return known[1]
    with torch.inference_mode(False):  # a later call may need gradients
        seen = _by_values(rows, refuse)
    if version is not None:
        _SEEN[mask] = (version, seen)
    return seen


def _by_values(rows: torch.Tensor, refuse: Callable[[str], None]) -> Seen:
    def require(holds: Any, got: str) -> None:
        if not holds:
            refuse(got)

    rows = _allowed(rows, require)
    if rows.shape[1] == 1:
        return Seen(rows[:, 0].clone())
    queries, keys = rows.shape[1:]
    key_mask, query_mask = rows.any(1), rows.any(2)
    if torch.equal(rows, _outer(key_mask, query_mask)):
        return Seen(key_mask, query_mask)
    place = torch.arange(keys, device=rows.device)
    columns = None if key_mask.all() else key_mask
    if queries <= keys and torch.equal(rows, key_mask[:, None] & (place <= place[keys - queries :, None])):
        return Seen(columns, causal=True)
    # A query that sees nothing gets the bounds of the one before it, and no output.
    first = rows.view(torch.uint8).argmax(2).masked_fill(~query_mask, 0)
    last = (keys - 1 - rows.flip(2).view(torch.uint8).argmax(2)).masked_fill(~query_mask, -1)
    lower, upper = first.cummax(1).values, last.cummax(1).values
    inside = (place >= lower[..., None]) & (place <= upper[..., None]) & _outer(key_mask, query_mask)
    require(torch.equal(rows, inside), "another mask for each query, which is not one of such bounds")
    return Seen(columns, None if query_mask.all() else query_mask, bounds=(lower.int(), upper.int()))


def _in_a_graph(rows: torch.Tensor) -> Seen:
    """Inside torch.compile: conditions on values become PyTorch errors when the graph runs."""

    def require(holds: torch.Tensor, got: str) -> None:
        torch._assert_async(holds, f"4-bit attention: attn_mask: expected a key mask, got {got}")

    rows = _allowed(rows, require)
    if rows.shape[1] == 1:
        return Seen(rows[:, 0])
    key_mask, query_mask = rows.any(1), rows.any(2)
    got = (
        "another mask for each query: torch.compile cannot look for the bounds in it, exclude its modules or do not compile them"
    )
    require((rows == _outer(key_mask, query_mask)).all(), got)
    return Seen(key_mask, query_mask)


def _allowed(rows: torch.Tensor, require: Callable[[torch.Tensor, str], None]) -> torch.Tensor:
    """bool [batch or 1, queries or 1, keys], True where a key may be seen."""
    if rows.dtype != torch.bool:
        allowed = rows == 0
        require((allowed | (rows <= EXCLUDED)).all(), "an additive mask with other values")
        rows = allowed
    if rows.shape[1] > 1 and rows.stride(1):
        require((rows == rows[:, :1]).all(), "another mask for each head")
    return rows[:, 0]


def _outer(key_mask: torch.Tensor, query_mask: torch.Tensor) -> torch.Tensor:
    return key_mask[:, None] & query_mask[:, :, None]


def refuse_call(layer: AttentionLayer, what: str, expected: str, got: object, remedy: str) -> None:
    """Raise the ValueError for a call that 4-bit attention does not support."""
    raise ValueError(f"4-bit attention ({layer.name}): {what}: expected {expected}, got {got}; {remedy}")
