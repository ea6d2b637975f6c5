"""How KVCache stores codes and scales: rows, permuted so that a GPU's tensor cores take them without moving data.

A row holds the codes along the axis that a matrix product contracts: the head dim for a key, 128 tokens for one column of the
values. (With `kv_nvfp4` a row of the values is one token too, and is transposed before the product.) It is padded to a multiple
of 32 elements with code 0. Lane t of a quad feeds element 32 i + 8 t + e (t < 4, e < 8) to the i-th pair of matrix
instructions, so the row is stored lane by lane: byte 4 (I t + i) begins the 32-bit word of the eight elements e, where I is the
number of 32s. In a word, the codes of elements 2 p and 2 p + 1 are 16 bits apart: one instruction decodes two codes, side by side
as float16. Bytes 0 to 3 hold elements 0 and 2, 4 and 6, 1 and 3, 5 and 7. The first code of a byte has its magnitude at bits 1
to 3 and its sign at bit 7, like the upper byte of a float16. The second code has its magnitude at bits 4 to 6 and its sign at
bit 0. The scale of group 2 i + h is at byte I h + i of the row's scales, so a lane reads the scales of its words in one
piece.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from qat_kernels.spec import GROUP_SIZE, QuantSpec

ROW_MULTIPLE = 32
BLOCK_TOKENS = 128
"""Tokens of a block of values: one row for each column of the head dim."""
BLOCK_BYTES, BLOCK_SCALES = BLOCK_TOKENS // 2, BLOCK_TOKENS // GROUP_SIZE


class CacheTensors(NamedTuple):
    """The contents of a `KVCache`, as the kernels read them."""

    packed: dict[str, torch.Tensor]
    """`key_codes`, `key_scales` [B, Hk, capacity, bytes]; `value_codes`, `value_scales` [B, Hk, blocks, D, bytes]; and `sink`, V
    of the sink group [B, Hk, 16, D]. With a Q shift there is `key_bias`, float32 [B, Hk, capacity], too. With `kv_nvfp4` values
    are stored like keys, and there is no sink group. All except the sink group are rings: token j is in the place of
    token j % capacity. This matters only with a window, which keeps fewer tokens."""
    recent: torch.Tensor | None
    """V of the last slots as a ring [B, Hk, n, D], 0 where the mask excludes a slot. Slot s is at s % n. None with `kv_nvfp4`."""
    leftpad: torch.Tensor | None
    """int32 [B]: the first allowed slot of each sequence, at least `length` where there is none yet; None without a mask."""
    length: int
    """Slots filled so far."""
    spec: QuantSpec
    window: int | None
    """How many keys a query sees, its own among them; None: all before it."""

    @property
    def capacity(self) -> int:
        """The number of tokens that there is room for."""
        return self.packed["key_codes"].shape[2]

    @property
    def num_blocks(self) -> int:
        """The capacity in blocks of BLOCK_TOKENS tokens."""
        return self.capacity // BLOCK_TOKENS

    @property
    def stored(self) -> tuple[torch.Tensor | None, ...]:
        """The tensors that the kernels read and change, in the order of their arguments."""
        names = ("key_codes", "key_scales", "key_bias", "value_codes", "value_scales", "sink")
        return (*(self.packed.get(name) for name in names), self.recent)


def row_words(size: int) -> int:
    """I: how many times 32 elements a row of `size` has."""
    return -(-size // ROW_MULTIPLE)


def pack_rows(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [..., n] and scales uint8 [..., n / 16] -> bytes [..., 16 I] and scales [..., 2 I]."""
    words = row_words(codes.shape[-1])
    codes = F.pad(codes, (0, words * ROW_MULTIPLE - codes.shape[-1]))
    scales = F.pad(scales, (0, 2 * words - scales.shape[-1]), value=1)  # the byte of 2^-9, the scale of a group of zeros
    axes = codes.unflatten(-1, (words, 4, 4, 2))  # i, t, pair, element of the pair
    axes = axes.movedim(-4, -3).movedim(-1, -2)  # t, i, element, pair
    first, second = axes[..., 0::2], axes[..., 1::2]
    packed = (first & 7) << 1 | (first & 8) << 4 | (second & 7) << 4 | second >> 3
    return packed.flatten(-4), scales.unflatten(-1, (words, 2)).mT.flatten(-2)


def unpack_rows(packed: torch.Tensor, scales: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack_rows`: the first `size` codes, and their scales."""
    words = packed.shape[-1] // 16
    axes = packed.unflatten(-1, (4, words, 2, 2))  # t, i, element, byte of two pairs
    axes = torch.stack((axes >> 1 & 7 | axes >> 4 & 8, axes >> 4 & 7 | (axes & 1) << 3), -1).flatten(-2)  # t, i, element, pair
    codes = axes.movedim(-1, -2).movedim(-4, -3).flatten(-4)
    return codes[..., :size], scales.unflatten(-1, (2, words)).mT.flatten(-2)[..., : size // GROUP_SIZE]


def group_places(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where groups of 16 tokens lie among the blocks of values: block, h and i."""
    return groups // BLOCK_SCALES, groups % 2, groups % BLOCK_SCALES // 2
