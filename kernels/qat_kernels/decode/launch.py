"""`KVCache` with Triton: launches the kernels of append.py and attend.py, with the arguments and effects of eager.py."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from qat_kernels.reference import LOG2_E, scale_of_quantized
from qat_kernels.spec import GROUP_SIZE, QuantSpec
from qat_kernels.triton.device import TRITON, arch_of, on_device
from qat_kernels.triton.device import check_device as check_device
from qat_kernels.triton.nvfp4 import INTERPRET
from qat_kernels.triton.precompiled import PrecompiledKernel, pointer

from .append import append_kernel
from .attend import combine_kernel, split_kernel
from .byte_layout import BLOCK_TOKENS, CacheTensors, row_words


class Tile(NamedTuple):
    """The rows of a program (query heads of a key head, times new tokens), and how it is compiled."""

    block_m: int
    """Rows."""
    block_n: int
    """Keys that are looked at in one step."""
    num_warps: int
    num_stages: int
    maxnreg: int | None
    """The most registers that a thread may use."""
    programs: int
    """How many programs share a multiprocessor. The keys are split into as many parts as fill the GPU once."""


# Chosen by their machine code (tests/kernels/decode/test_triton_decode_aot.py): they do not spill with Triton 3.6 and 3.9.
_TILES = {
    (8, False): {4: Tile(8, BLOCK_TOKENS, 4, 3, None, 4), 8: Tile(8, BLOCK_TOKENS, 4, 2, None, 2)},
    (16, False): {4: Tile(16, BLOCK_TOKENS, 2, 2, None, 4), 8: Tile(16, BLOCK_TOKENS, 4, 2, None, 2)},
    (8, True): {4: Tile(8, 32, 1, 3, None, 11), 8: Tile(8, 64, 2, 2, None, 4)},
    (16, True): {4: Tile(16, 32, 1, 2, None, 6), 8: Tile(16, 64, 4, 2, None, 2)},
}
"""By rows, and by whether groups of V lie along the head dim; then by the largest row, in words of 32 elements."""


_WARP_GROUPS = TRITON > (3, 6)
"""Whether this Triton lets 4 warps compute a product of 8 columns together (sm_90, sm_100). Decoded values then go through
shared memory, and storing them there takes longer than the product."""


def choose(arch: int, rows: int, head_dim: int, spec: QuantSpec) -> Tile:
    """The tile for this many rows, some of which may be padding."""
    tiles = _TILES[8 if rows <= 8 else 16, spec.kv_only]
    tile = next(tile for words, tile in tiles.items() if row_words(head_dim) <= words)
    if spec.kv_only and 100 <= arch < 120 and tile.num_warps == 1:  # ptxas would stop at 168 registers, and spill
        return tile._replace(maxnreg=224)
    if _WARP_GROUPS and 90 <= arch < 120 and tile.num_warps == 4 and head_dim <= 128:  # wider rows would spill in two warps
        return tile._replace(num_warps=2, maxnreg=240)
    return tile


class Given(NamedTuple):
    """Which of the optional tensors are there."""

    leftpad: bool
    key_mask: bool
    k_shift: bool
    q_shift: bool

    @property
    def types(self) -> tuple[torch.dtype | None, ...]:
        """The types of k_shift, q_shift, key_mask and leftpad."""
        return (
            torch.float32 if self.k_shift else None,
            torch.float32 if self.q_shift else None,
            torch.uint8 if self.key_mask else None,
            torch.int32 if self.leftpad else None,
        )

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that the kernels are compiled with."""
        return {"HAS_LEFTPAD": self.leftpad, "HAS_KEY_MASK": self.key_mask, "HAS_K_SHIFT": self.k_shift}


@functools.cache
def _append_kernel_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, spec: QuantSpec, given: Given, ring: bool
) -> PrecompiledKernel:
    words = row_words(head_dim)
    return PrecompiledKernel(
        append_kernel,
        [dtype, dtype, *given.types, *_stored_types(dtype, spec, given), *[0] * 11],
        {
            "HEAD_DIM": head_dim, "WORDS": words, "BLOCK_WORDS": triton.next_power_of_2(words), **given.constants,
            "ROTATE": spec.rotate, "FOUR_OVER_SIX": spec.four_over_six, "KV_ONLY": spec.kv_only, "RING": ring,
            "DEPENDENT": _dependent(device),
        },
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


@functools.cache
def _attend_kernels_for(
    device: torch.device, dtype: torch.dtype, head_dim: int, spec: QuantSpec, given: Given,
    tile: Tile, block_p: int, negate: bool, has_window: bool, has_softcap: bool, sinks: torch.dtype | None,
) -> tuple[PrecompiledKernel, PrecompiledKernel]:  # fmt: skip
    words = row_words(head_dim)
    launched = {"launch_pdl": True} if _dependent(device) else {}
    split = PrecompiledKernel(
        split_kernel,
        [
            dtype, *given.types, *_stored_types(dtype, spec, given), *[torch.float32] * 2, *[0] * 11, 0.0, 0.0,
            0 if has_window else None, 0.0 if has_softcap else None,
        ],
        {
            "HEAD_DIM": head_dim, "WORDS": words, "BLOCK_WORDS": triton.next_power_of_2(words), "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n, "NEGATE": negate, **given.constants, "ROTATE": spec.rotate,
            "FOUR_OVER_SIX": spec.four_over_six, "KV_ONLY": spec.kv_only,
            "BEFORE_SM_89": arch_of(device) < 89, "DEPENDENT": _dependent(device),
        },
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.maxnreg, enable_fp_fusion=True, **launched,
    )  # fmt: skip
    combine = PrecompiledKernel(
        combine_kernel,
        [torch.float32, dtype, torch.float32, sinks, *[0] * 7],
        {
            "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "BLOCK_P": block_p,
            "HAS_K_SHIFT": given.k_shift, "DEPENDENT": _dependent(device),
        },
        num_warps=4, enable_fp_fusion=True, **launched,
    )  # fmt: skip
    return split, combine


def _stored_types(dtype: torch.dtype, spec: QuantSpec, given: Given) -> tuple[torch.dtype | None, ...]:
    """The types of `CacheTensors.stored`."""
    key_bias = torch.float32 if given.q_shift else None
    return (*[torch.uint8] * 2, key_bias, *[torch.uint8] * 2, *[None if spec.kv_only else dtype] * 2)


def _ring_size(cache: CacheTensors) -> int:
    return 0 if cache.recent is None else cache.recent.shape[2]


def append(
    cache: CacheTensors,
    k: torch.Tensor,
    v: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
) -> None:
    """Quantize and store K and V of the last slots, for which there is room already."""
    batch, num_heads_k, seqlen_new, head_dim = k.shape
    k, v = _rows(k), _rows(v)
    given = Given(cache.leftpad is not None, key_mask is not None, k_shift is not None, q_shift is not None)
    with on_device(k.device):
        _append_kernel_for(k.device, k.dtype, head_dim, cache.spec, given, cache.window is not None)(
            (batch * num_heads_k, (seqlen_new + GROUP_SIZE - 2) // GROUP_SIZE + 1, 1),
            _pointers(
                k, v, _contiguous(k_shift), _contiguous(q_shift), _uint8(key_mask), cache.leftpad, *cache.stored
            ),
            (*k.stride()[:3], *v.stride()[:3], num_heads_k, seqlen_new, cache.length, cache.num_blocks, _ring_size(cache)),
        )  # fmt: skip


def attend(
    cache: CacheTensors,
    q: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O in the strides of q, and LSE float32 [B, H, n], of the last n tokens in the cache."""
    given_q, q = q, _rows(q)
    given_q_shift, q_shift = q_shift, _contiguous(q_shift)
    device, (batch, num_heads, seqlen_new, head_dim) = q.device, q.shape
    spec, num_heads_k = cache.spec, cache.packed["key_codes"].shape[1]
    qheads_per_kvhead = num_heads // num_heads_k
    rows = qheads_per_kvhead * seqlen_new
    tile = choose(arch_of(device), rows, head_dim, spec)
    row_blocks = -(-rows // tile.block_m)
    tiles = -(-cache.length // tile.block_n)
    if cache.window is not None:  # as many as the keys of the windows may lie in
        tiles = min(tiles, (cache.window + seqlen_new + tile.block_n - 3) // tile.block_n + 1)
    programs = tile.programs * _processors(device)
    num_splits = max(1, min(tiles, programs // (batch * num_heads_k * row_blocks)))
    num_parts = num_splits if spec.kv_only else num_splits + 1  # the kept groups
    out, lse = torch.empty_like(q), q.new_empty((batch, num_heads, seqlen_new), dtype=torch.float32)
    partials = q.new_empty(batch * num_heads * seqlen_new * num_parts * (head_dim + 2), dtype=torch.float32)
    softmax_scale_log2 = scale_of_quantized(abs(scale), head_dim, spec) * LOG2_E
    given = Given(cache.leftpad is not None, key_mask is not None, k_shift is not None, q_shift is not None)
    # Complete groups do not need what `append` stores. q and q_shift are older than that kernel unless they were copied here.
    as_given = q is given_q and q_shift is given_q_shift
    early = int(seqlen_new == 1 and not given.leftpad and not spec.kv_only and as_given)
    with on_device(device):
        split, combine = _attend_kernels_for(
            device, q.dtype, head_dim, spec, given, tile, 16 if num_parts <= 16 else 64, scale < 0,
            cache.window is not None, softcap is not None, None if sinks is None else sinks.dtype,
        )  # fmt: skip
        split(
            (batch * num_heads_k, num_parts, row_blocks),
            _pointers(
                q, _contiguous(k_shift), q_shift, _uint8(key_mask), cache.leftpad, *cache.stored, partials, lse,
            ),
            (
                *q.stride()[:3], num_heads_k, qheads_per_kvhead, seqlen_new, cache.length, cache.num_blocks,
                _ring_size(cache), num_splits, early, softmax_scale_log2, scale, cache.window, softcap,
            ),
        )  # fmt: skip
        combine(
            (batch * num_heads * seqlen_new, 1, 1),
            _pointers(partials, out, lse, _contiguous(sinks)),
            (*out.stride()[:3], num_heads_k, qheads_per_kvhead, seqlen_new, num_parts),
        )  # fmt: skip
    return out, lse


def _dependent(device: torch.device) -> bool:
    """Whether a kernel may begin before the previous one ends, and waits for it itself (programmatic dependent launch)."""
    return not INTERPRET.value and arch_of(device) >= 90


def _pointers(*tensors: torch.Tensor | None) -> tuple[Any, ...]:
    """Tensors as kernels take them. A copy may be freed afterwards: whatever reuses its memory is written after the launch."""
    return tuple(map(pointer, tensors))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor, with neighbouring elements along the head dim."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _uint8(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


@functools.cache
def _processors(device: torch.device) -> int:
    """The number of streaming multiprocessors; under the interpreter 4, so that small problems are split too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
