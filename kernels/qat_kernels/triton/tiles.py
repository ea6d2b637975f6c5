"""Tile sizes of the Triton attention, chosen by GPU architecture, head dim and causality. Data, no autotuning.

Those of sm_90 for head dims up to 128 are the fastest of scripts/bench/tune.py on an H100 (torch 2.11, Triton 3.6). Those for
head dim 256 were measured on an H200. No other GPU was at hand: the other tiles are the largest tried whose loops do not spill
registers to memory and that fit shared memory and tensor memory (tests/kernels/triton/test_triton_aot.py), for bfloat16 without a
key mask.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from qat_kernels.spec import Q_SHIFT, UNEQUAL_HEAD_DIMS, QuantSpec


class Tile(NamedTuple):
    """The shape of one kernel's work."""

    block_m: int
    """Queries."""
    block_n: int
    """Keys: a divisor of 128, at least 32 in the forward, because groups of P~ lie inside a tile (layout.py)."""
    num_warps: int
    num_stages: int


class HopperTile(NamedTuple):
    """The shape of the work of a kernel of hopper/."""

    warp_groups: int
    """Of 64 rows each, beside the warp that copies."""
    block_n: int
    """Rows of a tile that is copied."""
    num_stages: int


class Apart(NamedTuple):
    """dK and dV by a kernel each, where the registers do not hold both. Scores are computed twice."""

    key: Tile
    value: Tile


class Tiles(NamedTuple):
    """What the three kernels use."""

    forward: Tile | HopperTile
    grad_query: Tile | HopperTile
    grad_key_value: Tile | HopperTile | Apart


# (block_m, block_n, num_warps, num_stages) of the forward, of dQ, and of dK and dV (or of each, `Apart`), by architecture, head
# dim and causality.
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
    (90, 256, False): ((64, 64, 8, 2), (128, 32, 8, 3), ((32, 128, 8, 3), (64, 128, 8, 2))),
    # Measured on an H200. B 2, H 16/4, L 4096: 1.51, 0.84, and 1.57 and 1.02 ms (next best: 1.53, 1.02, and 1.56 and 1.06). One
    # kernel takes 3.52 ms for dK and dV.
    (90, 256, True): ((64, 64, 8, 2), (128, 32, 8, 3), ((32, 128, 8, 3), (64, 128, 8, 2))),
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

# Kernels with bounds, a soft cap or a key bias (scores.py) take the same tiles, except these, which would spill. With a key bias
# on sm_90, products of a loop with three stages would wait for each other (ptxas C7515). Of several options the last one counts.
_OF_VARIANTS = {
    ("bounds", 80, 64): {"grad_key_value": (32, 64, 8, 2)},
    ("bounds", 80, 128): {"forward": (64, 32, 8, 2)},
    ("bounds", 120, 128): {"grad_key_value": (16, 32, 8, 2)},
    ("softcap", 90, 128): {"grad_key_value": (64, 64, 8, 2)},
    (Q_SHIFT, 90, 64): {"forward": (128, 64, 8, 2), "grad_query": (128, 64, 8, 2)},
    (Q_SHIFT, 90, 128): {"forward": (64, 64, 4, 2), "grad_query": (128, 64, 8, 2), "grad_key_value": (64, 64, 8, 2)},
    (Q_SHIFT, 90, 256): {"forward": (64, 32, 8, 2), "grad_query": (128, 32, 8, 2)},
    (Q_SHIFT, 120, 128): {"grad_key_value": (16, 32, 8, 2)},
    ("bounds", 90, 256): {"forward": (64, 32, 8, 2), "grad_query": (64, 32, 8, 2)},
    ("softcap", 90, 256): {"forward": (64, 32, 8, 2), "grad_query": (128, 32, 8, 1)},
}

HOPPER = 90
"""The architecture of hopper/."""
# Its forward, by head dim, causality, and what it computes: O' too, nothing but O, or O from BF16 P and V. Measured on an H200
# for head dim 128, where BF16 P and V would spill with 128 keys.
_HOPPER_FORWARD = {
    (64, False, "out_hp"): HopperTile(2, 128, 4),
    (64, False, ""): HopperTile(3, 128, 4),
    (64, False, "bf16_pv"): HopperTile(3, 128, 4),
    (64, True, "out_hp"): HopperTile(2, 128, 4),
    (64, True, ""): HopperTile(3, 128, 4),
    (64, True, "bf16_pv"): HopperTile(3, 128, 4),
    (128, False, "out_hp"): HopperTile(2, 128, 2),
    (128, False, ""): HopperTile(3, 128, 2),
    (128, False, "bf16_pv"): HopperTile(3, 64, 4),
    (128, True, "out_hp"): HopperTile(2, 128, 2),
    (128, True, ""): HopperTile(3, 64, 4),
    (128, True, "bf16_pv"): HopperTile(3, 64, 4),
}
# The same where all queries see all keys and these are few: dense_forward.py, which quantizes Q itself. Measured on an H200.
_HOPPER_TO_ALL = {
    (64, "out_hp"): HopperTile(2, 128, 4),
    (64, ""): HopperTile(3, 128, 4),
    (128, "out_hp"): HopperTile(2, 128, 2),
    (128, ""): HopperTile(3, 64, 4),
}
_MOST_KEYS = 1024
"""Up to here it is faster: with 32,760 keys it is not."""
_HOPPER_BACKWARD = {"grad_query": HopperTile(3, 64, 3), "grad_key_value": HopperTile(2, 64, 4)}
_BACKWARD_OPTIONS = frozenset({"bounds", "irregular", "packed", "out_hp", "key_mask", "sinks", "rotate"})
_HOPPER_OPTIONS = {
    "forward": frozenset({"bounds", "irregular", "packed", "out_hp", "k_shift", "rotate", "bf16_pv"}),
    "grad_query": _BACKWARD_OPTIONS,
    "grad_key_value": _BACKWARD_OPTIONS,
}
"""What they know of `options`."""
HOPPER_TRITON = (3, 6)
"""The version of Triton whose Gluon they are written for, and have run with."""
_Options = tuple[str, ...]


def _of_gradients(*options: _Options) -> dict[str, set[_Options]]:
    """The same for both kernels of the backward."""
    found = {(*each, "out_hp") for each in options}
    return {"grad_query": found, "grad_key_value": found}


def _with_and_without_gradient(*options: _Options) -> set[_Options]:
    return {(*each, *gradient) for each in options for gradient in ((), ("out_hp",))}


_WINDOW = ("bounds",)
_BOUNDS = ("bounds", "irregular")
_ROTATED = (("rotate",), ("packed", "rotate"))
_SHIFTED = ("k_shift", "rotate")
_PACKED_AND_SHIFTED = ("packed", "k_shift", "rotate")
_COMPARED: dict[tuple[int, bool], dict[str, set[_Options]]] = {
    (64, False): {
        "forward": _with_and_without_gradient((), ("packed",), *_ROTATED, _SHIFTED),
        "to_all": _with_and_without_gradient(()),
        **_of_gradients((), ("packed",), ("key_mask",), ("sinks",), *_ROTATED),
        "splits": {(), ("rotate",)},
    },
    (64, True): {
        "forward": _with_and_without_gradient(
            (), _WINDOW, _BOUNDS, ("packed",), *_ROTATED, _SHIFTED, _PACKED_AND_SHIFTED
        ),
        **_of_gradients((), _WINDOW, _BOUNDS, ("packed",), ("key_mask",), ("sinks",), ("bounds", "sinks"), *_ROTATED),
    },
    (128, False): {
        "forward": _with_and_without_gradient((), ("packed",), ("packed", "k_shift"), *_ROTATED, _SHIFTED),
        "to_all": _with_and_without_gradient(()),
        **_of_gradients((), ("packed",), ("key_mask",), ("sinks",), *_ROTATED),
        "splits": {(), ("rotate",)},
    },
    (128, True): {
        "forward": {
            *_with_and_without_gradient(
                (), _WINDOW, _BOUNDS, ("packed",), ("packed", "k_shift"), *_ROTATED, _SHIFTED, _PACKED_AND_SHIFTED
            ),
            ("bounds", "k_shift", "rotate", "out_hp"),
            ("bounds", "packed", "out_hp"),
            ("bounds", "irregular", "packed", "out_hp"),
        },
        **_of_gradients(
            (), _WINDOW, _BOUNDS, ("packed",), ("bounds", "packed"), ("bounds", "irregular", "packed"), ("key_mask",),
            ("sinks",), ("bounds", "sinks"), *_ROTATED, ("bounds", "rotate"), ("key_mask", "rotate"),
        ),
    },
    **{(head_dim, causal): _of_gradients(()) for head_dim in (40, 80, 96) for causal in (False, True)},
}  # fmt: skip
"""The options of the calls, by head dim, causality (`Mask.hides_keys`) and kernel, whose results have been compared on an H200
with those of the Triton kernels (tests/kernels/triton/test_hopper_gpu.py) since these kernels last changed. Beside other options,
"bounds" were compared as windows, and in packed calls as blocks too. "splits": whether dK and dV may be summed in parts."""

ARCHITECTURES = (80, 90, 100, 120)
"""The entries of the table; the architectures between them (86, 89, 103, 121) take the entry below. Those of sm_80 fit the
99 KiB of shared memory that sm_86 and sm_89 have."""

SPILLS: dict[tuple[int, ...], tuple[int, ...]] = {(3, 6): (80, 90, 120), (3, 7): (120,), (3, 8): (90, 120)}
"""Versions of Triton that keep too little in registers for some tiles, by entry of the table: the same numbers, but slower."""


def entry_of(arch: int) -> int:
    """The entry of the table that an architecture takes."""
    return max(each for each in ARCHITECTURES if each <= arch)


def options_of(
    spec: QuantSpec,
    *,
    bounds: bool,
    softcap: bool,
    irregular: bool = False,
    packed: bool = False,
    key_mask: bool = False,
    k_shift: bool = False,
    q_shift: bool = False,
    sinks: bool = False,
    with_gradient: bool = True,
    unequal_head_dims: bool = False,
) -> tuple[str, ...]:
    """What a call has besides its head dim and causality: which kernel serves it, and its tiles, depend on that.

    `bounds`: its mask has a window, blocks, a prefix, or bounds of its own; `irregular`: one of the last two.
    """
    rows = (
        ("bounds", bounds),
        ("irregular", irregular),
        ("softcap", softcap),
        ("packed", packed),
        ("key_mask", key_mask),
        ("k_shift", k_shift),
        (Q_SHIFT, q_shift),
        ("sinks", sinks),
        ("smoothing", spec.formats.smooth is not None),
        ("rotate", spec.rotate),
        ("bf16_pv", not spec.quantizes_pv),
        (UNEQUAL_HEAD_DIMS, unequal_head_dims),
        ("out_hp", with_gradient and spec.quantizes_pv),
    )
    return tuple(name for name, there in rows if there)


def _tile(numbers: tuple[Any, ...]) -> Any:
    """A `Tile` of four numbers, or an `Apart` of two times four."""
    return Tile(*numbers) if len(numbers) == len(Tile._fields) else Apart(*map(_tile, numbers))


@lru_cache
def choose(arch: int, head_dim: int, causal: bool, options: tuple[str, ...] = (), gluon: tuple[int, ...] | None = None) -> Tiles:
    """The tiles for an architecture (80 for sm_80), a head dim and causality; those of hopper/ where it serves the call.

    `gluon`: the version of Triton, if it has Gluon.
    """
    entry, size = entry_of(arch), next(size for size in (64, 128, 256) if head_dim <= size)
    chosen = Tiles(*map(_tile, _TILES[entry, size, causal]))
    for option in options:
        changed = _OF_VARIANTS.get((option, entry, size), {})
        chosen = chosen._replace(**{name: _tile(each) for name, each in changed.items()})
    if arch != HOPPER or gluon is None:
        return chosen
    for kernel in Tiles._fields:
        if why_not_hopper(kernel, gluon, head_dim, causal, options) is None:
            computes = next((name for name in ("out_hp", "bf16_pv") if name in options), "")
            tile = _HOPPER_BACKWARD.get(kernel) or _HOPPER_FORWARD[head_dim, causal, computes]
            chosen = chosen._replace(**{kernel: tile})
    return chosen


def why_not_hopper(kernel: str, triton: tuple[int, ...], head_dim: int, causal: bool, options: tuple[str, ...]) -> str | None:
    """Why a kernel of hopper/ does not serve a call, so that the Triton kernel runs; None if it does.

    `kernel`: a field of `Tiles`; `options`: of `options_of`.
    """
    if triton != HOPPER_TRITON:
        return f"it has run with Triton {'.'.join(map(str, HOPPER_TRITON))} only, and this is {'.'.join(map(str, triton))}"
    width = next(size for size in (32, 64, 128, 256) if head_dim <= size)  # of operands
    if width not in (64, 128) or (kernel == "forward" and head_dim != width):
        return f"it does not take head_dim {head_dim}"
    if missing := [name for name in options if name not in _HOPPER_OPTIONS[kernel]]:
        return f"it does not compute {', '.join(missing)}"
    if not is_compared(kernel, head_dim, causal, options):
        return "its results for such calls have not been compared on a GPU yet"
    return None


def to_all_of(head_dim: int, causal: bool, options: tuple[str, ...], keys: int) -> HopperTile | None:
    """The tile of hopper/dense_forward.py, if it serves a call whose forward runs in hopper/; None if it does not.

    `keys`: how many there are.
    """
    tile = _HOPPER_TO_ALL.get((head_dim, "".join(options)))
    return tile if not causal and keys <= _MOST_KEYS and is_compared("to_all", head_dim, causal, options) else None


def is_compared(kernel: str, head_dim: int, causal: bool, options: tuple[str, ...]) -> bool:
    """Whether the results of a kernel of hopper/ have been compared on a GPU for such calls. Others it does not serve."""
    return options in _COMPARED.get((head_dim, causal), {}).get(kernel, ())
