"""Operands of the attention kernels, and what they are made of: layout.py says where values lie, quantize.py computes them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton

from qat_kernels.mask import Bounds
from qat_kernels.spec import GROUP_SIZE, Formats, NVFP4Format
from qat_kernels.varlen import Packing

from .layout import PAD
from .nvfp4 import INTERPRET
from .precompiled import Launch, Pointer
from .quantize import allowed_keys_kernel, fake_quantize_kv_kernel, quantize_rows_kernel, quantize_tokens_kernel, unpack_kernel

PLANS = 1024
"""How many are kept: calls of so many shapes and options cost little on the host."""
_ELEMENTS = 4096
"""Elements of a tile: 32 for each thread of four warps."""


class Layout(NamedTuple):
    """A tensor as kernels are compiled for it: [B, H, L, D], or [total, H, D] of packed sequences."""

    shape: torch.Size
    strides: tuple[int, ...]
    """Of batch, heads, tokens and head dim; packed tensors have no batch."""
    dtype: torch.dtype
    aligned: bool
    """Whether it begins at a multiple of 16."""

    @classmethod
    def of(cls, x: torch.Tensor) -> Layout:
        """That of a tensor."""
        return cls(x.shape, strides_of(x), x.dtype, x.data_ptr() % 16 == 0)

    @property
    def pointer(self) -> Pointer:
        """What stands for it where a kernel is compiled."""
        return Pointer(self.dtype, aligned=self.aligned)


class Sequences(NamedTuple):
    """The sequences of one side, queries or keys: a batch of equal lengths, or packed ones."""

    batch: int
    """How many sequences there are."""
    num_heads: int
    max_seqlen: int
    """Tokens of a sequence; of the longest one where they are packed."""
    total: int
    """Tokens of a head of the tensor: `max_seqlen`, or all of the packed ones."""
    packed: bool = False
    lead: int = 0
    """LEAD, which is PAD - 16 for keys where groups are kept."""

    @property
    def rows(self) -> int:
        """Operand rows of a head: of one sequence, or of all where they are packed (see `layout.first_row`)."""
        if self.packed:
            return (self.total // PAD + self.batch * (2 if self.lead else 1)) * PAD
        return -(-(self.lead + self.max_seqlen) // PAD) * PAD

    @property
    def all_rows(self) -> int:
        """Rows of the whole operand."""
        return self.rows * self.num_heads * (1 if self.packed else self.batch)

    def blocks(self, size: int) -> int:
        """Blocks of `size` rows in the longest sequence."""
        return -(-(self.lead + self.max_seqlen) // PAD) * PAD // size


class Codes(NamedTuple):
    """A tensor in 4.5 bits a value."""

    codes: torch.Tensor
    """uint8, two codes a byte: a row of D / 2 bytes for each slot; for V a row of D bytes for every two of them."""
    scales: torch.Tensor
    """uint8, the bits of E4M3: a row of D / 16 for each slot; for V a row of D for every 16 of them."""

    @staticmethod
    def shapes(
        sequences: Sequences, head_dim: int, *, along_tokens: bool, col_major: bool = False
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of codes and scales, whose groups lie along the tokens (V) or along the head dim (Q, K).

        With `col_major` those of V have a row for each of the D columns of every PAD slots, as FP4 units read it.
        """
        rows = sequences.all_rows
        if col_major:
            return (rows // PAD * head_dim, PAD // 2), (rows // PAD * head_dim, PAD // GROUP_SIZE)
        if along_tokens:
            return (rows // 2, head_dim), (rows // GROUP_SIZE, head_dim)
        return (rows, head_dim // 2), (rows, head_dim // GROUP_SIZE)

    @classmethod
    def empty(
        cls, sequences: Sequences, head_dim: int, *, along_tokens: bool, col_major: bool = False, device: torch.device
    ) -> Codes:
        """Memory for them."""
        shapes = cls.shapes(sequences, head_dim, along_tokens=along_tokens, col_major=col_major)
        return cls(*(torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes))


def allowed_keys(key_mask: torch.Tensor | None, keys: Sequences) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A mask bool [B, Lk] as kernels read it: uint8 [B, rows] by slot, counted from each sequence's first allowed key.

    And leftpad, int32 [B]: the number of that key.
    """
    if key_mask is None:
        return None, None
    allowed = torch.empty((keys.batch, keys.rows), dtype=torch.uint8, device=key_mask.device)
    leftpad = torch.empty(keys.batch, dtype=torch.int32, device=key_mask.device)
    launch = _allowed_keys_launch(key_mask.device, key_mask.stride(), key_mask.data_ptr() % 16 == 0, keys)
    launch(key_mask, allowed, leftpad)
    return allowed, leftpad


@lru_cache(PLANS)
def _allowed_keys_launch(device: torch.device, strides: tuple[int, int], aligned: bool, keys: Sequences) -> Launch:
    """Its tensors: a key mask, and what `allowed_keys` returns."""
    block_l = min(1024, triton.next_power_of_2(keys.rows))
    return Launch.of(
        allowed_keys_kernel,
        (keys.batch, -(-keys.rows // block_l)),
        [Pointer(torch.bool, aligned=aligned), Pointer(torch.uint8), Pointer(torch.int32)],
        [*strides, keys.max_seqlen, keys.rows],
        {"LEAD": keys.lead, "BLOCK_L": block_l},
        num_warps=4,
    )


def strides_of(x: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, heads, tokens and head dim; packed tensors [total, H, D] have no batch."""
    strides = x.stride()
    return strides if len(strides) == 4 else (0, strides[1], strides[0], strides[2])


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """`strides_of` of a contiguous tensor of this shape."""
    return strides_of(torch.empty(shape, device="meta"))


def head_strides(queries: Sequences) -> tuple[int, int]:
    """Strides of batch and heads of one number for each row: [B, H, L], or [H, total] of packed sequences."""
    return (0 if queries.packed else queries.num_heads * queries.total), queries.total


def order_of(block_n: int) -> int:
    """ORDER for tiles of so many keys."""
    return min(block_n, 64)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16, which holds quantized values exactly. Under the interpreter float32 stays, so that tests see every bit."""
    return torch.float32 if INTERPRET.value and dtype == torch.float32 else torch.bfloat16


class Given(NamedTuple):
    """Which of the tensors that may be missing are there, and all that kernels are compiled for about them."""

    key_mask: bool = False
    k_shift: bool = False
    bounds_stride: int | None = None
    """Of the bounds, if there are some, from one sequence to the next."""
    sinks: bool = False
    aligned: bool = True
    """Whether those that come from outside begin at multiples of 16."""

    def pointer(self, dtype: torch.dtype, there: bool) -> Pointer | None:
        """What stands for one of them where a kernel is compiled."""
        return Pointer(dtype, aligned=self.aligned) if there else None

    def key_mask_pointers(self) -> tuple[Pointer | None, Pointer | None]:
        """The same for what `allowed_keys` returns."""
        return (Pointer(torch.uint8), Pointer(torch.int32)) if self.key_mask else (None, None)

    def bound_pointers(self) -> tuple[Pointer | None, Pointer | None]:
        """The same for `lower_ptr` and `upper_ptr`."""
        pointer = self.pointer(torch.int32, self.bounds_stride is not None)
        return pointer, pointer


_NOTHING = Given()


def given_tensors(
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    packing: Packing | None,
    bounds: Bounds | None,
    sinks: torch.Tensor | None,
) -> tuple[Given, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What is there; and as kernels read them: k_shift, lower and upper bounds with as many rows as the longer has, sinks."""
    if key_mask is None and k_shift is None and packing is None and bounds is None and sinks is None:
        return _NOTHING, None, None, None, None
    lower = upper = bounds_stride = None
    if bounds is not None:
        lower, upper = (x.contiguous() for x in torch.broadcast_tensors(*bounds))
        bounds_stride = lower.shape[1] if len(lower) > 1 else 0
    k_shift = None if k_shift is None else k_shift.contiguous()
    sinks = None if sinks is None else sinks.float().contiguous()
    outside = (k_shift, lower, upper, sinks, *(() if packing is None else packing[:2]))
    aligned = all(x.data_ptr() % 16 == 0 for x in outside if x is not None)
    given = Given(key_mask is not None, k_shift is not None, bounds_stride, sinks is not None, aligned)
    return given, k_shift, lower, upper, sinks


def rounding(how: NVFP4Format | str | None) -> dict[str, bool]:
    """The constants of kernels that round to this format."""
    if not isinstance(how, NVFP4Format):
        return {"FOUR_OVER_SIX": False, "RECIPROCAL": False}
    return {"FOUR_OVER_SIX": how.four_over_six, "RECIPROCAL": how.scale == "reciprocal"}


def rows_launch(
    x: Layout,
    sequences: Sequences,
    given: Given,
    how: NVFP4Format | str | None,
    *,
    is_k: bool,
    heads_per_k_shift: int = 1,
    order: int = 0,
    negate: bool = False,
    rotate: bool = False,
    operand: torch.dtype | None = None,
    codes: bool = False,
) -> Launch:
    """Q or K, of any strides, quantized along the head dim: the operand unless its dtype is None, and `codes` if asked for.

    Its tensors: x, k_shift, the key mask by slot and leftpad, cu_seqlens, the operand, codes and scales, and q_dot_k_shift.

    Args:
        is_k: K, minus `k_shift` float32 [Hk, D]. Otherwise Q, with the opposite sign if `negate`; then q_dot_k_shift, float32
            [B, H, L] or [H, total], takes the product of each row with its key head's shift.
        order: ORDER of the operand's rows (layout.py); 0 for slots in their own order. Codes have it only without an operand.
    """
    head_dim, block_d = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    block_l = _block_l(block_d)
    num_blocks = sequences.blocks(block_l)
    key_mask = given.key_mask and is_k
    shift = given.pointer(torch.float32, given.k_shift)
    uint8 = Pointer(torch.uint8) if codes else None
    return Launch.of(
        quantize_rows_kernel,
        (sequences.batch * sequences.num_heads * num_blocks,),
        [
            x.pointer, shift, *(given.key_mask_pointers() if key_mask else (None, None)),
            given.pointer(torch.int32, sequences.packed), Pointer(operand) if operand else None, uint8, uint8,
            Pointer(torch.float32) if given.k_shift and not is_k else None,
        ],
        [
            *x.strides, sequences.rows if key_mask else 0, *(head_strides(sequences) if given.k_shift and not is_k else (0, 0)),
            sequences.num_heads, sequences.max_seqlen, num_blocks, sequences.rows, heads_per_k_shift, -1.0 if negate else 1.0,
        ],
        {
            "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_L": block_l, "LEAD": sequences.lead, "ORDER": order, "IS_K": is_k,
            "HAS_K_SHIFT": given.k_shift, "HAS_KEY_MASK": key_mask, "VARLEN": sequences.packed, "ROTATE": rotate,
            **rounding(how), "STORE_OPERAND": operand is not None, "STORE_CODES": codes,
        },
        num_warps=4,
    )  # fmt: skip


def tokens_launch(
    x: Layout,
    sequences: Sequences,
    given: Given,
    how: NVFP4Format | None,
    *,
    quantized: torch.dtype | None = None,
    unquantized: torch.dtype | None = None,
    order: int = 0,
    codes: bool = False,
    col_major: bool = False,
) -> Launch:
    """V, of any strides: the operand quantized along the tokens and the one as it is, each unless its dtype is None, and `codes`.

    Its tensors: x, the key mask by slot and leftpad, cu_seqlens, both operands, codes and scales: by rows or `col_major`
    (`Codes.shapes`), always in the order of the slots. `order` as in `rows_launch`.
    """
    head_dim, block_d = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    # One warp holds whole groups of 16 tokens, so that their maxima are found without shared memory.
    block_c = min(block_d, 64)
    block_l = min(PAD, 1024 // block_c)
    num_blocks = sequences.blocks(block_l)
    uint8 = Pointer(torch.uint8) if codes else None
    return Launch.of(
        quantize_tokens_kernel,
        (sequences.batch * sequences.num_heads * num_blocks, block_d // block_c),
        [
            x.pointer, *given.key_mask_pointers(), given.pointer(torch.int32, sequences.packed),
            *(dtype and Pointer(dtype) for dtype in (quantized, unquantized)), uint8, uint8,
        ],
        [
            *x.strides, sequences.rows if given.key_mask else 0,
            sequences.num_heads, sequences.max_seqlen, num_blocks, sequences.rows,
        ],
        {
            "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_C": block_c, "BLOCK_L": block_l, "LEAD": sequences.lead,
            "HAS_KEY_MASK": given.key_mask, "VARLEN": sequences.packed, **rounding(how), "ORDER": order,
            "STORE_QUANTIZED": quantized is not None, "STORE_UNQUANTIZED": unquantized is not None, "STORE_CODES": codes,
            "COL_MAJOR": col_major,
        },
        num_warps=1,
    )  # fmt: skip


def unpack_launch(sequences: Sequences, head_dim: int, operand: torch.dtype, *, along_tokens: bool) -> Launch:
    """Codes into an operand, slots in their own order; groups lie along the tokens (V) or along the head dim (Q, K).

    Its tensors: codes, scales, and the operand.
    """
    block_d = triton.next_power_of_2(head_dim)
    block_l = _block_l(block_d)
    uint8 = Pointer(torch.uint8)
    return Launch.of(
        unpack_kernel,
        (sequences.all_rows // block_l,),
        [uint8, uint8, Pointer(operand)],
        [],
        {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_L": block_l, "ALONG_TOKENS": along_tokens},
        num_warps=4,
    )


def fake_quantize_kv(
    key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None, formats: Formats
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V, [B, H, L, D] or [total, H, D] of any strides, quantized along the head dim and back: contiguous, in their dtype.

    What `key_mask` bool [B, L] excludes is zero.
    """
    outs = (
        torch.empty_like(key, memory_format=torch.contiguous_format),
        torch.empty_like(value, memory_format=torch.contiguous_format),
    )
    if not key.numel():
        return outs
    head_dim, block_d = key.shape[-1], triton.next_power_of_2(key.shape[-1])
    block_l, num_rows = _block_l(block_d), key.numel() // head_dim
    # Of packed sequences a row is a head of a token: as if heads were tokens.
    sizes = (key.shape[1], key.shape[2], num_rows) if key.ndim == 4 else (1, key.shape[1], num_rows)
    strides = [x.stride() if x.ndim == 4 else (x.stride(0), 0, x.stride(1), x.stride(2)) for x in (key, value)]
    assert formats.value is not None and formats.key.scale == formats.value.scale == "reciprocal", "one rule for both"
    fake_quantize_kv_kernel[(-(-num_rows // block_l), 2)](
        key, value, None if key_mask is None else key_mask.contiguous(), *outs, *strides[0], *strides[1], *sizes,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=block_l, HAS_KEY_MASK=key_mask is not None,
        FOUR_OVER_SIX=formats.key.four_over_six, RECIPROCAL=True, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return outs


def _block_l(block_d: int) -> int:
    """Slots of a tile."""
    return min(PAD, max(GROUP_SIZE, _ELEMENTS // block_d))
