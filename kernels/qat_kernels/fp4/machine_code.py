"""Does the compiled kernel multiply on FP4 units? Its PTX says so, which every installation of Triton has."""

from __future__ import annotations

import re
from typing import Any

from .launch import Tile, choose, padded_head_dim

_LABEL, _JUMP = re.compile(r"^\s*(\$\w+):"), re.compile(r"\bbra(?:\.uni)?\s+(\$\w+)\s*;")
_PRODUCT = re.compile(r"\b(?:tcgen05\.mma|mma\.sync)\b[\w.:]*")
_FP4 = "kind::mxf4nvf4"


def why_not_on_fp4_units(kernel: Any, arch: int, head_dim: int, quantize_pv: bool) -> str | None:
    """Why the main loop of a compiled kernel does not take all of its products from FP4 units; None if it does.

    Args:
        kernel: what Triton's launch returns.
        arch: 100 for sm_100, and so on.
        head_dim: of the call.
        quantize_pv: whether P and V are quantized too.
    """
    found = products_in_loop(kernel.asm["ptx"])
    expected = products_of_tile(arch, choose(arch, head_dim, quantize_pv), padded_head_dim(head_dim), quantize_pv)
    if found >= expected:
        return None
    return f"its main loop has {found} products of FP4 units where a tile needs {expected}"


def products_of_tile(arch: int, tile: Tile, block_d: int, with_pv: bool) -> int:
    """Products of FP4 units in a tile: a warp's of 16 rows, 8 columns and 64 contracted values (sm_120), or the block's."""
    if arch >= 120:
        rows = tile.block_m // (16 * tile.num_warps)
        return rows * (tile.block_n // 8 * (block_d // 64) + (block_d // 8 * (tile.block_n // 64) if with_pv else 0))
    return block_d // 64 + (tile.block_n // 64 if with_pv else 0)


def products_in_loop(ptx: str) -> int:
    """Products of FP4 units in that innermost loop which has most of them."""
    lines = ptx.splitlines()
    labels = {match[1]: number for number, line in enumerate(lines) if (match := _LABEL.match(line))}
    ends = {match[1]: number for number, line in enumerate(lines) if (match := _JUMP.search(line)) and match[1] in labels}
    loops = [(labels[label], end) for label, end in ends.items() if labels[label] < end]  # to the last jump back
    places = [number for number, line in enumerate(lines) if (match := _PRODUCT.search(line)) and _FP4 in match[0]]
    counts = {loop: sum(loop[0] < place < loop[1] for place in places) for loop in loops}
    found = [loop for loop, count in counts.items() if count]
    innermost = [loop for loop in found if not any(loop[0] < start and stop < loop[1] for start, stop in found)]
    return max((counts[loop] for loop in innermost), default=0)
