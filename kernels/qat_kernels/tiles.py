"""Tile sizes of the Triton attention, chosen by GPU architecture, head dim and causality. Data, no autotuning.

None of them has been measured yet: they compile for their architecture without spilling registers to memory, and fit its
shared memory and tensor memory (tests/test_triton_aot.py), for bfloat16 without a key mask. Measured
choices will replace them one by one.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """The shape of one kernel's work."""

    queries: int
    keys: int
    """A multiple of 16, because groups of P~ lie inside a tile."""
    warps: int
    stages: int


class Tiles(NamedTuple):
    """What the three kernels use."""

    forward: Tile
    grad_query: Tile
    grad_key_value: Tile


# (queries, keys, warps, stages) of the forward, of dQ, and of dK and dV. COMPILED ONLY, not measured: the largest tiles tried
# that do not spill with Triton 3.6 and 3.9, by architecture, head dim and causality.
_COMPILED = {
    (80, 64, False): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (80, 64, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (80, 128, False): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (80, 128, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (80, 256, False): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (80, 256, True): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (90, 64, False): ((64, 128, 4, 3), (128, 64, 8, 3), (128, 64, 4, 2)),
    (90, 64, True): ((64, 128, 4, 3), (128, 64, 8, 3), (128, 64, 4, 2)),
    (90, 128, False): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2)),
    (90, 128, True): ((64, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    (90, 256, False): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (90, 256, True): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (100, 64, False): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (100, 64, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (100, 128, False): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (100, 128, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (100, 256, False): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (100, 256, True): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (120, 64, False): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (120, 64, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (120, 128, False): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (120, 128, True): ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2)),
    (120, 256, False): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (120, 256, True): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
}

ARCHITECTURES = (80, 90, 100, 120)
"""The entries of the table; the architectures between them (86, 89, 103, 121) take the entry below."""
_SMALL_SHARED_MEMORY = (86, 89)
"""These have 99 KiB of shared memory, as sm_120 has and sm_80 has not, and its matrix instructions: they take its tiles."""


def choose(arch: int, head_dim: int, causal: bool) -> Tiles:
    """The tiles for an architecture (80 for sm_80), a head dim and causality."""
    entry = 120 if arch in _SMALL_SHARED_MEMORY else max(each for each in ARCHITECTURES if each <= arch)
    chosen = _COMPILED[entry, next(size for size in (64, 128, 256) if head_dim <= size), causal]
    return Tiles(*(Tile(*each) for each in chosen))
