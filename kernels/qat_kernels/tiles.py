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
    (80, 64, False): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (80, 64, True): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (80, 128, False): ((128, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
    (80, 128, True): ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
    (80, 256, False): ((32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (80, 256, True): ((32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (90, 64, False): ((128, 128, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    (90, 64, True): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    (90, 128, False): ((128, 32, 8, 2), (128, 64, 8, 2), (32, 128, 8, 1)),
    (90, 128, True): ((128, 64, 8, 2), (128, 64, 8, 2), (16, 128, 8, 2)),
    (90, 256, False): ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (90, 256, True): ((64, 16, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (100, 64, False): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2)),
    (100, 64, True): ((128, 64, 8, 2), (128, 32, 8, 2), (32, 128, 8, 2)),
    (100, 128, False): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (100, 128, True): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (100, 256, False): ((32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (100, 256, True): ((32, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (120, 64, False): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (120, 64, True): ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
    (120, 128, False): ((64, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2)),
    (120, 128, True): ((64, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    (120, 256, False): ((32, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
    (120, 256, True): ((32, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1)),
}
_SMALLEST = ((16, 16, 4, 1),) * 3
"""For 256 columns of float32, on every architecture."""

ARCHITECTURES = (80, 90, 100, 120)
"""The entries of the table; the architectures between them (86, 89, 103, 121) take the entry below."""
_SMALL_SHARED_MEMORY = (86, 89)
"""These have 99 KiB of shared memory, as sm_120 has and sm_80 has not, and its matrix instructions: they take its tiles."""


def choose(arch: int, head_dim: int, causal: bool, masked: bool, element_size: int) -> Tiles:
    """The tiles for an architecture (80 for sm_80), a head dim, causality, a key mask and the bytes of an input element.

    float32 takes what 16 bits take for twice the head dim, which is the same number of bytes. A key mask takes registers: a
    causal forward with tiles of more than 32 keys would spill 144 bytes a thread; some other masked kernels spill up to 72.
    """
    columns = head_dim * element_size // 2
    if columns > 256:
        chosen = _SMALLEST
    else:
        entry = 120 if arch in _SMALL_SHARED_MEMORY else max(each for each in ARCHITECTURES if each <= arch)
        chosen = _COMPILED[entry, next(size for size in (64, 128, 256) if columns <= size), causal]
    chosen = Tiles(*(Tile(*each) for each in chosen))
    return chosen._replace(forward=chosen.forward._replace(keys=min(chosen.forward.keys, 32))) if masked else chosen
