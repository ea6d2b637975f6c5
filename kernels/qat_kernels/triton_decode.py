"""`KVCache` with Triton: launches the kernels of _append.py and _decode.py. Takes and changes what the eager cache does."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from . import reference
from ._append import append_kernel
from ._decode import combine_kernel, split_kernel
from ._layout import Sequences
from ._quantize import block_of, quantize_rows
from .kv_layout import BLOCK_TOKENS, row_words
from .spec import GROUP_SIZE
from .triton_attention import _arch, _on, check_device

if TYPE_CHECKING:
    from .kv_cache import KVCache

_PROGRAMS_PER_PROCESSOR = 4
"""Programs that split the keys between them fill the GPU once: 128 threads with up to 128 registers each fit four times."""


class Tile(NamedTuple):
    """The rows of a program (query heads of a key head, times new tokens), and how it is compiled."""

    rows: int
    warps: int
    stages: int
    max_registers: int | None
    """Of a thread."""


# Chosen by their machine code (tests/test_triton_decode_aot.py): they do not spill with Triton 3.6 and 3.9. Not tuned on a GPU.
_ONE_TOKEN = Tile(16, 4, 3, 128)
_ONE_TOKEN_WIDE = Tile(16, 4, 2, None)
"""For head dims above 128 or with padded rows, and before sm_89, where scales take more instructions: 128 registers spill."""
_MORE = Tile(32, 8, 2, None)
"""More rows read the cache again for each 32 of them."""


def choose(arch: int, rows: int, head_dim: int) -> Tile:
    """The tile for so many rows; fewer than 16 are padded."""
    if rows > _ONE_TOKEN.rows:
        return _MORE
    return _ONE_TOKEN if arch >= 89 and head_dim in (32, 64, 128) else _ONE_TOKEN_WIDE


def append(cache: KVCache, k: torch.Tensor, key_mask: torch.Tensor | None, k_shift: torch.Tensor | None, new: int) -> None:
    """Quantize and store the last `new` slots, whose V is at the end of `cache._recent` already."""
    check_device(k.device)
    batch, heads, _, head_dim = k.shape
    words, packed = row_words(head_dim), cache._packed
    with _on(k.device):
        append_kernel[(batch * heads, (new + GROUP_SIZE - 2) // GROUP_SIZE + 1)](
            k, cache._recent, None if k_shift is None else k_shift.contiguous(), _uint8(key_mask), cache._first,
            packed["key_codes"], packed["key_scales"], packed["value_codes"], packed["value_scales"], packed["sink"],
            *k.stride(), heads, new, cache.length, packed["key_codes"].shape[2], cache._recent.shape[2],
            HEAD_DIM=head_dim, WORDS=words, BLOCK_WORDS=block_of(words),
            ALIGNED=cache._first is not None, MASKED=key_mask is not None, SHIFTED=k_shift is not None,
            ROTATE=cache.spec.rotate, FOUR_OVER_SIX=cache.spec.four_over_six, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def attend(
    cache: KVCache, q: torch.Tensor, key_mask: torch.Tensor | None, k_shift: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """O in the strides of q, and LSE float32 [B, H, n], of the last n tokens in the cache."""
    batch, heads, new, head_dim = q.shape
    key_heads, capacity = cache._packed["key_codes"].shape[1:3]
    group, words = heads // key_heads, row_words(head_dim)
    rows = group * new
    arch = _arch(q.device)
    tile = choose(arch, rows, head_dim)
    blocks = -(-rows // tile.rows)
    tiles = -(-cache.length // BLOCK_TOKENS)
    splits = max(1, min(tiles, _PROGRAMS_PER_PROCESSOR * _processors(q.device) // (batch * key_heads * blocks)))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    parts = q.new_empty(batch, key_heads, splits + 1, rows, head_dim, dtype=torch.float32)
    stats = q.new_empty(batch, key_heads, splits + 1, 2, rows, dtype=torch.float32)
    shift_dot = None
    if k_shift is not None:
        k_shift, shift_dot = k_shift.contiguous(), torch.empty_like(lse)
    with _on(q.device):
        # The rows of a key head lie together: its query heads, each with its new tokens.
        side = Sequences(batch, key_heads, rows, rows)
        dots = None if shift_dot is None else shift_dot.view(batch, key_heads, rows)
        options = {"rotate": cache.spec.rotate, "four_over_six": cache.spec.four_over_six, "negate": scale < 0}
        by_key_head = q.unflatten(1, (key_heads, group)).flatten(2, 3)
        quantized = quantize_rows(by_key_head, side, keys=False, shift=k_shift, dots=dots, **options)
        split_kernel[(batch * key_heads, splits + 1, blocks)](
            quantized, *(cache._packed[name] for name in ("key_codes", "key_scales", "value_codes", "value_scales", "sink")),
            cache._recent, cache._first, _uint8(key_mask), parts, stats,
            key_heads, rows, new, cache.length, capacity, cache._recent.shape[2], splits, side.rows,
            reference.scale_of_quantized(abs(scale), head_dim, cache.spec) * reference.LOG2_E,
            HEAD_DIM=head_dim, WORDS=words, BLOCK_WORDS=block_of(words), BLOCK_M=tile.rows,
            Q_WIDTH=quantized.shape[1],
            ALIGNED=cache._first is not None, MASKED=key_mask is not None, ONE=new == 1, BEFORE_SM_89=arch < 89,
            num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
        )  # fmt: skip
        combine_kernel[(batch * heads * new,)](
            parts, stats, shift_dot, out, lse, *out.stride(), key_heads, group, new, splits + 1, scale,
            HEAD_DIM=head_dim, BLOCK_D=block_of(head_dim), BLOCK_P=16, SHIFTED=k_shift is not None,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, lse


def _uint8(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter a few, so that small problems are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
