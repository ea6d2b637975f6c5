"""The masks that diffusers hands to its dispatcher, as 4-bit attention takes them; what it does not take is refused.

What a mask says has to be read from its values, and on a GPU that waits for all work queued before. It is read once for each mask
object: a forward pass hands one object to all its blocks. What was read is forgotten with the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from qat_patch.layer import AttentionLayer

EXCLUDED = -9000.0
"""What an additive mask must at most hold where it excludes a key; the usual values are -10000 (-9984 in bfloat16) and -inf."""


class Seen(NamedTuple):
    """Which keys the queries of a call see, as `qat_kernels.attention` takes it."""

    key_mask: torch.Tensor | None = None
    """bool [batch, keys], True where a key may be seen; None: all of them."""
    query_mask: torch.Tensor | None = None
    """bool [batch, queries], False where a query sees nothing at all, so that its output is zero; None: all see something."""
    causal: bool = False
    """The last query sees all keys of `key_mask`, and each one before it a key less."""
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None
    """int32 [batch or 1, queries]: of the keys of `key_mask`, each query sees those from the first bound to the second."""


_SEEN: Any = WeakTensorKeyDictionary()
"""By mask object: its version when it was read, and what it says."""


def read(layer: AttentionLayer, mask: torch.Tensor | None, batch: int, queries: int, keys: int) -> Seen:
    """What a mask says, if it is one that 4-bit attention computes.

    It may be boolean, or additive with 0 where a key may be seen and -10000 or less where not, and the same for all heads.

    - A key mask: the same for all queries. Or the outer product of what is no padding: padding sees nothing then.
    - Causal, by single keys or by blocks (frames of a video), or a window: each query sees the keys from one bound to another,
      and neither bound ever decreases along the queries. The bounds are compared with the mask exactly. Inside torch.compile,
      which cannot ask for values, such a mask is refused.

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
        return Seen(rows[:, 0, 0].expand(batch, keys))  # nothing depends on its values
    seen = _in_a_graph(rows) if torch.compiler.is_compiling() else _read_once(mask, rows, refuse)
    key_mask, query_mask = (None if x is None else x.expand(batch, -1) for x in (seen.key_mask, seen.query_mask))
    return seen._replace(key_mask=key_mask, query_mask=query_mask)


def _read_once(mask: torch.Tensor, rows: torch.Tensor, refuse: Callable[[str], None]) -> Seen:
    """What the values say, from the last time unless they have been written to since.

    Nothing here may be a view of the mask, which would keep it alive. Nobody knows whether a tensor of inference mode has been
    written to: it is read again at each call.
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
    """Inside torch.compile: conditions on values become errors of PyTorch's own when the graph runs."""

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
    """Raise the ValueError of a call that 4-bit attention does not compute."""
    raise ValueError(f"4-bit attention ({layer.name}): {what}: expected {expected}, got {got}; {remedy}")
