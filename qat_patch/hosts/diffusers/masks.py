"""The masks that diffusers hands to its dispatcher, as 4-bit attention takes them; what it does not take is refused."""

from __future__ import annotations

import torch

from qat_patch.layer import AttentionLayer

EXCLUDED = -9000.0
"""What an additive mask must at most hold where it excludes a key; the usual values are -10000 (-9984 in bfloat16) and -inf."""


def key_and_query_masks(
    layer: AttentionLayer, mask: torch.Tensor | None, batch: int, queries: int, keys: int
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """The mask as a key mask, bool [batch, keys], if it is one; a query mask; and whether it is causal besides.

    It may be boolean, or additive with 0 where a key may be seen and -10000 or less where not, in any shape that is the same
    for all heads and queries. Queries that may see nothing at all (padding, in a mask that is the outer product of what is
    none) come as a second mask, bool [batch, queries]: their output is zero. Causal is a mask by which the last query sees all
    keys that may be seen, and each one before it a key less; inside torch.compile, which cannot ask for values, it is refused.

    Raises:
        ValueError: it is another mask.
    """
    if mask is None:
        return None, None, False

    def refuse(got: str) -> None:
        refuse_call(
            layer,
            "attn_mask",
            f"a key mask [{batch}, 1, 1, {keys}] or [{batch}, {keys}]: bool, True where a key may be seen, or float, 0 there and "
            "at most -10000 elsewhere",
            got,
            "exclude the modules that receive such masks from the patch",
        )

    def require(holds: torch.Tensor, got: str) -> None:
        """A condition on values: an error now, or, inside torch.compile, one of PyTorch's own when the graph runs."""
        if torch.compiler.is_compiling():
            torch._assert_async(holds, f"4-bit attention: attn_mask: expected a key mask, got {got}")
        elif not holds:
            refuse(got)

    rows = mask[:, None, None] if mask.ndim == 2 else mask
    if rows.ndim != 4 or rows.shape[0] not in (1, batch) or rows.shape[2] not in (1, queries) or rows.shape[3] != keys:
        refuse(f"{mask.dtype} {tuple(mask.shape)}")
    if rows.dtype != torch.bool:
        allowed = rows == 0
        require((allowed | (rows <= EXCLUDED)).all(), "an additive mask with other values")
        rows = allowed
    if rows.shape[1] > 1 and rows.stride(1):
        require((rows == rows[:, :1]).all(), "another mask for each head")
    rows = rows[:, 0]
    if rows.shape[1] == 1:
        return rows[:, 0].expand(batch, keys), None, False
    key_mask, query_mask = rows.any(1), rows.any(2)
    is_outer = (rows == key_mask[:, None] & query_mask[:, :, None]).all()
    if not torch.compiler.is_compiling() and not is_outer and queries <= keys:
        place = torch.arange(keys, device=rows.device)
        if (rows == key_mask[:, None] & (place <= place[keys - queries :, None])).all():
            return None if key_mask.all() else key_mask.expand(batch, keys), None, True
    require(is_outer, "another mask for each query")
    return key_mask.expand(batch, keys), query_mask.expand(batch, queries), False


def refuse_call(layer: AttentionLayer, what: str, expected: str, got: object, remedy: str) -> None:
    """Raise the ValueError of a call that 4-bit attention does not compute."""
    raise ValueError(f"4-bit attention ({layer.name}): {what}: expected {expected}, got {got}; {remedy}")
