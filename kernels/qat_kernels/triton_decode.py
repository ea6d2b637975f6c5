"""`KVCache` with Triton: launches the kernels of _append.py and _decode.py. Takes and changes what the eager cache does."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

import torch

from . import reference
from ._append import append_kernel
from ._decode import combine_kernel, split_kernel
from ._launch import Variant
from ._quantize import block_of
from .kv_layout import BLOCK_TOKENS, row_words
from .spec import GROUP_SIZE, QuantSpec
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


@functools.cache
def _append_variant(
    device: torch.device, dtype: torch.dtype, head_dim: int, spec: QuantSpec, aligned: bool, masked: bool, shifted: bool
) -> Variant:
    words = row_words(head_dim)
    return Variant(
        append_kernel,
        [dtype, dtype, *_optional(aligned, masked, shifted), *_packed_types(dtype), *[0] * 11],
        {
            "HEAD_DIM": head_dim, "WORDS": words, "BLOCK_WORDS": block_of(words),
            "ALIGNED": aligned, "MASKED": masked, "SHIFTED": shifted,
            "ROTATE": spec.rotate, "FOUR_OVER_SIX": spec.four_over_six,
        },
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@functools.cache
def _attend_variants(
    device: torch.device, dtype: torch.dtype, head_dim: int, spec: QuantSpec, aligned: bool, masked: bool, shifted: bool,
    tile: Tile, negate: bool, one: bool,
) -> tuple[Variant, Variant]:  # fmt: skip
    words = row_words(head_dim)
    split = Variant(
        split_kernel,
        [dtype, *_optional(aligned, masked, shifted), *_packed_types(dtype), *[torch.float32] * 2, *[0] * 10, 0.0, 0.0],
        {
            "HEAD_DIM": head_dim, "WORDS": words, "BLOCK_WORDS": block_of(words), "BLOCK_M": tile.rows, "NEGATE": negate,
            "ALIGNED": aligned, "MASKED": masked, "SHIFTED": shifted,
            "ROTATE": spec.rotate, "FOUR_OVER_SIX": spec.four_over_six, "ONE": one, "BEFORE_SM_89": _arch(device) < 89,
        },
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.max_registers, enable_fp_fusion=True,
    )  # fmt: skip
    combine = Variant(
        combine_kernel,
        [torch.float32, dtype, torch.float32, *[0] * 7],
        {"HEAD_DIM": head_dim, "BLOCK_D": block_of(head_dim), "BLOCK_P": 16, "SHIFTED": shifted},
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return split, combine


def _optional(aligned: bool, masked: bool, shifted: bool) -> tuple[torch.dtype | None, ...]:
    """Types of shift, mask and first."""
    return torch.float32 if shifted else None, torch.uint8 if masked else None, torch.int32 if aligned else None


def _packed_types(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of `KVCache._packed` and `_recent`."""
    return (*[torch.uint8] * 4, dtype, dtype)


def append(cache: KVCache, k: torch.Tensor, v: torch.Tensor, key_mask: torch.Tensor | None, k_shift: torch.Tensor | None) -> None:
    """Quantize and store K and V of the last slots, for which there is room already."""
    check_device(k.device)
    batch, heads, new, head_dim = k.shape
    k, v = _rows(k), _rows(v)
    packed, recent, first = cache._packed, cache._recent, cache._first
    given = (first is not None, key_mask is not None, k_shift is not None)
    with _on(k.device):
        _append_variant(k.device, k.dtype, head_dim, cache.spec, *given)(
            (batch * heads, (new + GROUP_SIZE - 2) // GROUP_SIZE + 1, 1),
            k, v, None if k_shift is None else k_shift.contiguous(), _uint8(key_mask), first, *packed.values(), recent,
            *k.stride()[:3], *v.stride()[:3], heads, new, cache.length, packed["value_codes"].shape[2], recent.shape[2],
        )  # fmt: skip


def attend(
    cache: KVCache, q: torch.Tensor, key_mask: torch.Tensor | None, k_shift: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """O in the strides of q, and LSE float32 [B, H, n], of the last n tokens in the cache."""
    q = _rows(q)
    device, (batch, heads, new, head_dim) = q.device, q.shape
    packed, recent, first, spec = cache._packed, cache._recent, cache._first, cache.spec
    key_heads, blocks = packed["value_codes"].shape[1:3]
    group = heads // key_heads
    rows = group * new
    tile = choose(_arch(device), rows, head_dim)
    row_blocks = -(-rows // tile.rows)
    tiles = -(-cache.length // BLOCK_TOKENS)
    splits = max(1, min(tiles, _PROGRAMS_PER_PROCESSOR * _processors(device) // (batch * key_heads * row_blocks)))
    out, lse = torch.empty_like(q), q.new_empty((batch, heads, new), dtype=torch.float32)
    parts = q.new_empty(batch * heads * new * (splits + 1) * (head_dim + 2), dtype=torch.float32)
    qk_scale = reference.scale_of_quantized(abs(scale), head_dim, spec) * reference.LOG2_E
    given = (first is not None, key_mask is not None, k_shift is not None)
    with _on(device):
        split, combine = _attend_variants(device, q.dtype, head_dim, spec, *given, tile, scale < 0, new == 1)
        split(
            (batch * key_heads, splits + 1, row_blocks),
            q, None if k_shift is None else k_shift.contiguous(), _uint8(key_mask), first, *packed.values(), recent, parts, lse,
            *q.stride()[:3], key_heads, group, new, cache.length, blocks, recent.shape[2], splits, qk_scale, scale,
        )  # fmt: skip
        combine((batch * heads * new, 1, 1), parts, out, lse, *out.stride()[:3], key_heads, group, new, splits + 1)
    return out, lse


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With a head dim of neighbouring elements."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _uint8(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


@functools.cache
def _processors(device: torch.device) -> int:
    """Streaming multiprocessors; under the interpreter a few, so that small problems are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
