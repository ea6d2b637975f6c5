"""Tensors in tiles that the hardware can copy by itself, in the order that the matrix units of Hopper read."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qat_kernels.triton.operands import Given
from qat_kernels.triton.precompiled import Argument, Pointer, Tiles
from qat_kernels.triton.problem import Problem

from .pipeline import WARP_GROUP_ROWS
from .ranges import starts_early


class _Descriptor(TensorDescriptor):
    """Gluon's own class, without its checks at every launch."""

    def __post_init__(self) -> None:
        """Checks nothing."""


class HopperTiles(Tiles):
    """Where a kernel will get a tensor [rows, columns] in tiles of some rows, or [rows] in tiles of some numbers.

    Or [batch, heads, tokens, D] of any strides, in tiles of some tokens of a head.
    """

    def descriptor(self, base: Argument | Pointer) -> Any:
        """As Gluon takes a tensor, or an address, in tiles."""
        if self.strides:
            block = [1, 1, self.block_rows, self.shape[3]]
            return _Descriptor(self.pointer(base), [*self.shape], [*self.strides], block, _layout(*block))
        columns = self.shape[1:]
        return _Descriptor(
            self.pointer(base), [*self.shape], [*columns, 1], [self.block_rows, *columns], _layout(self.block_rows, *columns)
        )


def seen_of(problem: Problem, given: Given) -> tuple[int, int, int, int] | None:
    """SEEN of the kernels (ranges.py)."""
    mask = problem.mask
    if not mask.hides_keys:
        return None
    bounded = 0 if given.bounds_stride is None else 1 if given.bounds_stride == 0 else 2
    return mask.window or 0, mask.block_size, mask.prefix, bounded


def blocks_of_queries(rows: int, block_rows: int, seen: tuple[int, int, int, int] | None) -> int:
    """How many blocks of queries a head has; `rows_before` of the kernels may be in front of them."""
    return -(-(rows + (WARP_GROUP_ROWS.value - 1 if starts_early(seen) else 0)) // block_rows)


def rows_of(all_rows: int, columns: int, block_rows: int) -> HopperTiles:
    """An operand."""
    return HopperTiles(torch.bfloat16, (all_rows, columns), block_rows)


def tokens_of(shape: tuple[int, ...], strides: tuple[int, ...], block_rows: int) -> HopperTiles:
    """Q, O or O'. Rows behind the last token are read as zeros, and not written."""
    return HopperTiles(torch.bfloat16, shape, block_rows, strides)


def numbers_of(count: int, block_rows: int) -> HopperTiles:
    """A float32 for every row."""
    return HopperTiles(torch.float32, (count,), block_rows)


@lru_cache
def _layout(rows: int, *columns: int) -> gl.NVMMASharedLayout:
    if not columns:
        return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    return gl.NVMMASharedLayout.get_default_for([rows, *columns], gl.bfloat16)
