"""Which keys each query sees, described by a few numbers (docs/NUMERICS.md, section 4)."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch


class Bounds(NamedTuple):
    """The first and the last key that each query sees, int32 [B or 1, Lq], in positions of the key tensor as it is given."""

    lower: torch.Tensor
    upper: torch.Tensor

    def check(self, keys: int) -> None:
        """Check the values. This waits for the GPU if they are there.

        Raises:
            ValueError: a bound decreases, or is not a position among the keys.
        """
        for name, x, first in (("lower", self.lower, 0), ("upper", self.upper, -1)):
            if not x.numel():
                continue
            if bool((x[:, 1:] < x[:, :-1]).any()):
                row, query = (x[:, 1:] < x[:, :-1]).nonzero()[0].tolist()
                got = f"{x[row, query].item()} for query {query}, then {x[row, query + 1].item()} (row {row})"
                raise ValueError(f"attention: bounds: expected {name} bounds that never decrease along the queries, got {got}")
            least, most = (int(bound) for bound in x.aminmax())
            if least < first or most > keys + first:
                raise ValueError(
                    f"attention: bounds: expected {name} bounds from {first} to {keys + first} for {keys} keys (lower > upper is "
                    f"an empty interval), got {least} to {most}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Query i sees key j if j < prefix, or lower(i) <= j <= upper(i); a key mask and packed sequences come on top.

    The bounds follow from the numbers below, or come as tensors. The default: every query sees every key.
    """

    causal: bool = False
    """Whether upper(i) is the query's own place p_i = i + (Lk - Lq), or the end of its block."""
    window: int | None = None
    """How many keys a query sees, counted back from upper(i)."""
    block_size: int = 1
    """The size of the blocks of a causal mask: a query sees its block to the end."""
    prefix: int = 0
    """How many of the first keys every query sees."""
    bounded: bool = False
    """Whether the bounds are tensors, `Bounds`."""

    @property
    def hides_keys(self) -> bool:
        """Whether the form of the mask can hide the last key from a query: then groups are kept."""
        return self.causal or self.bounded

    @cached_property
    def is_plain(self) -> bool:
        """Whether `causal` describes the whole mask."""
        return self == Mask(causal=self.causal)

    @property
    def is_irregular(self) -> bool:
        """Whether the mask has a prefix or given bounds, so that no formula of the query alone describes it."""
        return self.bounded or self.prefix > 0

    def bounds(
        self, seqlen_q: int, seqlen_k: int, leftpad: torch.Tensor | None, given: Bounds | None, device: torch.device
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """lower and upper [B or 1, Lq], counted from the first allowed key, which is `leftpad` [B, 1].

        None if nothing is cut off: lower without a window, both if every query sees every key.
        """
        if not self.hides_keys:
            return None, None
        if given is not None:
            lower: torch.Tensor | None = given.lower.long()
            upper = given.upper.long()
        else:
            lower, upper = None, torch.arange(seqlen_q, device=device)[None] + (seqlen_k - seqlen_q)
        if leftpad is not None:
            lower, upper = None if lower is None else lower - leftpad, upper - leftpad
        if self.block_size > 1:
            upper = (upper.div(self.block_size, rounding_mode="floor") + 1) * self.block_size - 1
        if self.window is not None:
            lower = upper - (self.window - 1)
        last = seqlen_k - 1 if leftpad is None else seqlen_k - 1 - leftpad
        if self.block_size > 1:
            upper = torch.minimum(upper, torch.as_tensor(last, device=device))
        if self.prefix:
            upper = torch.maximum(upper, torch.as_tensor(last, device=device).clamp(max=self.prefix - 1))
        return lower, upper

    def to_json(self) -> str:
        """One line of JSON with every field; `from_json` is its inverse."""
        # Written out because torch.compile can trace this and cannot trace json.dumps.
        causal, bounded = str(self.causal).lower(), str(self.bounded).lower()
        window = "null" if self.window is None else self.window
        return (
            f'{{"causal": {causal}, "window": {window}, "block_size": {self.block_size}, "prefix": {self.prefix}, '
            f'"bounded": {bounded}}}'
        )

    @staticmethod
    @lru_cache
    def from_json(text: str) -> Mask:
        """The mask that `to_json` wrote."""
        return Mask(**json.loads(text))
