"""Tile sizes of the Triton attention, chosen by GPU architecture, head dim and causality. Data, no autotuning.

Those of sm_90 for head dims up to 128 are the fastest of scripts/bench/tune.py on an H100 (torch 2.11, Triton 3.6). No other GPU
was at hand: their tiles are the largest tried whose loops do not spill registers to memory and that fit shared memory and tensor
memory (tests/kernels/triton/test_triton_aot.py), for bfloat16 without a key mask.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from qat_kernels.mask import Mask


class Tile(NamedTuple):
    """The shape of one kernel's work."""

    block_m: int
    """Queries."""
    block_n: int
    """Keys: a divisor of 128, at least 32 in the forward, because groups of P~ lie inside a tile (layout.py)."""
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """What the three kernels use."""

    forward: Tile
    grad_query: Tile
    grad_key_value: Tile


# (block_m, block_n, num_warps, num_stages) of the forward, of dQ, and of dK and dV, by architecture, head dim and causality.
_TILES = {
    (80, 64, False): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (80, 64, True): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (80, 128, False): ((128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
    (80, 128, True): ((128, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    (80, 256, False): ((32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (80, 256, True): ((32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    # Measured. B 4, H 16, L 8192, D 64: 3.97, 2.28 and 6.75 ms (next best: 4.07, 2.31, 6.81; 128 queries: 6.24, but spills).
    (90, 64, False): ((64, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    (90, 64, True): ((64, 128, 4, 3), (128, 64, 8, 3), (64, 64, 4, 3)),
    # Measured. B 1, H 12, L 32760: 17.2, 13.3 and 25.7 ms (next best: 18.3, 15.7, 27.9).
    (90, 128, False): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
    # Measured. B 2, H 40/8, L 4096: 1.34, 0.95 and 2.49 ms (next best: 1.58, 0.97, 2.64).
    (90, 128, True): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    (90, 256, False): ((64, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2)),
    (90, 256, True): ((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    (100, 64, False): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    (100, 64, True): ((128, 64, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2)),
    (100, 128, False): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (100, 128, True): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (100, 256, False): ((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    (100, 256, True): ((16, 32, 4, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    (120, 64, False): ((128, 64, 8, 2), (128, 32, 8, 2), (16, 128, 8, 2)),
    (120, 64, True): ((128, 64, 8, 2), (128, 32, 8, 2), (16, 128, 8, 2)),
    (120, 128, False): ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (120, 128, True): ((32, 32, 4, 2), (32, 32, 4, 2), (16, 32, 4, 2)),
    (120, 256, False): ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
    (120, 256, True): ((16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
}

# Kernels with bounds or a soft cap (scores.py) take the same tiles, but for these, which would spill.
_OF_VARIANTS = {
    ("bounds", 80, 64): {"grad_key_value": (32, 64, 8, 2)},
    ("bounds", 80, 128): {"forward": (64, 32, 8, 2)},
    ("bounds", 120, 128): {"grad_key_value": (16, 32, 8, 2)},
    ("softcap", 90, 128): {"grad_key_value": (64, 64, 8, 2)},
    ("softcap", 90, 256): {"grad_query": (128, 32, 8, 1), "grad_key_value": (16, 64, 8, 2)},
}

ARCHITECTURES = (80, 90, 100, 120)
"""The entries of the table; the architectures between them (86, 89, 103, 121) take the entry below. Those of sm_80 fit the
99 KiB of shared memory that sm_86 and sm_89 have."""

SPILLS: dict[tuple[int, ...], tuple[int, ...]] = {(3, 6): (80, 90, 120), (3, 7): (120,)}
"""Versions of Triton that keep too little in registers for some tiles, by entry of the table: the same numbers, but slower."""


def entry_of(arch: int) -> int:
    """The entry of the table that an architecture takes."""
    return max(each for each in ARCHITECTURES if each <= arch)


def variants(mask: Mask, softcap: float | None) -> tuple[str, ...]:
    """Which of `bounds` and `softcap` a call's kernels have."""
    return (() if mask.is_plain else ("bounds",)) + (() if softcap is None else ("softcap",))


@lru_cache
def choose(arch: int, head_dim: int, causal: bool, variants: tuple[str, ...] = ()) -> Tiles:
    """The tiles for an architecture (80 for sm_80), a head dim and causality; `variants`: `bounds` and `softcap`."""
    entry, size = entry_of(arch), next(size for size in (64, 128, 256) if head_dim <= size)
    chosen = Tiles(*(Tile(*each) for each in _TILES[entry, size, causal]))
    for variant in variants:
        changed = _OF_VARIANTS.get((variant, entry, size), {})
        chosen = chosen._replace(**{name: Tile(*each) for name, each in changed.items()})
    return chosen
