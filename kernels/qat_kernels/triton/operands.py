"""Operands of the attention kernels, and what they are made of: layout.py says where values lie, quantize.py computes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from qat_kernels.mask import Bounds
from qat_kernels.spec import GROUP_SIZE, Formats

from .layout import PAD
from .nvfp4 import INTERPRET
from .quantize import fake_quantize_kv_kernel, quantize_rows_kernel, quantize_tokens_kernel, unpack_kernel

_ELEMENTS = 4096
"""Elements of a tile: 32 for each thread of four warps."""


class Sequences(NamedTuple):
    """The sequences of one side, queries or keys: a batch of equal lengths, or packed ones."""

    batch: int
    """How many sequences there are."""
    num_heads: int
    max_seqlen: int
    """Tokens of a sequence; of the longest one where they are packed."""
    total: int
    """Tokens of a head of the tensor: `max_seqlen`, or all of the packed ones."""
    cu_seqlens: torch.Tensor | None = None
    """int32 [batch + 1]: the bounds of packed sequences; None for a batch of equal lengths."""
    lead: int = 0
    """LEAD, which is PAD - 16 for keys where groups are kept."""

    @property
    def rows(self) -> int:
        """Operand rows of a head: of one sequence, or of all where they are packed (see `layout.first_row`)."""
        if self.cu_seqlens is not None:
            return (self.total // PAD + self.batch * (2 if self.lead else 1)) * PAD
        return -(-(self.lead + self.max_seqlen) // PAD) * PAD

    @property
    def all_rows(self) -> int:
        """Rows of the whole operand."""
        return self.rows * self.num_heads * (self.batch if self.cu_seqlens is None else 1)

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


class AllowedKeys(NamedTuple):
    """The keys that a key mask allows."""

    mask: torch.Tensor
    """uint8 [B, rows], by slot."""
    leftpad: torch.Tensor
    """int32 [B]: the first allowed token of each sequence."""


def allowed_keys(key_mask: torch.Tensor | None, keys: Sequences) -> AllowedKeys | None:
    """A mask bool [B, Lk] by slot, counted from each sequence's first allowed key."""
    if key_mask is None:
        return None
    leftpad = key_mask.to(torch.uint8).argmax(1)
    token = leftpad[:, None] + torch.arange(keys.rows, device=key_mask.device) - keys.lead
    inside = (token >= leftpad[:, None]) & (token < keys.max_seqlen)
    mask = key_mask.gather(1, token.clamp(0, keys.max_seqlen - 1)) & inside
    return AllowedKeys(mask.view(torch.uint8), leftpad.to(torch.int32))


def key_mask_pointers(allowed: AllowedKeys | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`key_mask_ptr` and `leftpad_ptr` of a kernel."""
    return (None, None) if allowed is None else allowed


def key_mask_stride(allowed: AllowedKeys | None) -> int:
    """`key_mask_stride` of a kernel."""
    return 0 if allowed is None else allowed.mask.stride(0)


def bound_pointers(bounds: Bounds | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`lower_ptr` and `upper_ptr` of a kernel, rows contiguous, as many as the longer one has."""
    if bounds is None:
        return None, None
    lower, upper = torch.broadcast_tensors(*bounds)
    return lower.contiguous(), upper.contiguous()


def bounds_stride(bounds: Bounds | None) -> int | None:
    """`bounds_stride` of a kernel: from one sequence to the next."""
    if bounds is None:
        return None
    rows, length = max(len(x) for x in bounds), bounds.lower.shape[1]
    return length if rows > 1 else 0


def strides_of(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of batch, heads, tokens and head dim; packed tensors [total, H, D] have no batch."""
    if x.ndim == 4:
        return x.stride(0), x.stride(1), x.stride(2), x.stride(3)
    return 0, x.stride(1), x.stride(0), x.stride(2)


def head_strides(x: torch.Tensor) -> tuple[int, int]:
    """Strides of batch and heads of one number for each row: [B, H, L], or [H, total] of packed sequences."""
    return (x.stride(0), x.stride(1)) if x.ndim == 3 else (0, x.stride(0))


def order_of(block_n: int) -> int:
    """ORDER for tiles of so many keys."""
    return min(block_n, 64)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16, which holds quantized values exactly. Under the interpreter float32 stays, so that tests see every bit."""
    return torch.float32 if INTERPRET.value and dtype == torch.float32 else torch.bfloat16


def descriptors(operands: list[torch.Tensor | None], rows: list[int]) -> list[TensorDescriptor | None]:
    """Tiles of `rows` rows of each operand, which the hardware can copy by itself."""
    return [x if x is None else TensorDescriptor.from_tensor(x, [n, x.shape[1]]) for x, n in zip(operands, rows, strict=True)]


def quantize_rows(
    x: torch.Tensor,
    sequences: Sequences,
    *,
    is_k: bool,
    order: int = 0,
    allowed: AllowedKeys | None = None,
    k_shift: torch.Tensor | None = None,
    q_dot_k_shift: torch.Tensor | None = None,
    negate: bool = False,
    rotate: bool = False,
    four_over_six: bool = False,
    reciprocal: bool = False,
    operand: bool = True,
    codes: Codes | None = None,
) -> torch.Tensor | None:
    """Q or K, [B, H, L, D] or [total, H, D] of any strides, quantized along the head dim.

    Returns:
        The operand unless it is not wanted; `codes` are written where they are given.

    Args:
        is_k: K, minus `k_shift`. Otherwise Q, with the opposite sign if `negate`.
        order: ORDER of the operand's rows (layout.py); 0 for slots in their own order. Codes have it only without an operand.
        k_shift: float32 [Hk, D], contiguous.
        rotate, four_over_six, reciprocal: as the spec and its formats say.
        q_dot_k_shift: for Q, takes the product of each row with its key head's shift; float32 [B, H, L] or [H, total].
    """
    head_dim, block_d = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    block_l = _block_l(block_d)
    num_blocks = sequences.blocks(block_l)
    result = x.new_empty((sequences.all_rows, block_d), dtype=operand_dtype(x.dtype)) if operand else None
    quantize_rows_kernel[(sequences.batch * sequences.num_heads * num_blocks,)](
        x, k_shift, *key_mask_pointers(allowed), sequences.cu_seqlens, result, *(codes or (None, None)), q_dot_k_shift,
        *strides_of(x), key_mask_stride(allowed), *((0, 0) if q_dot_k_shift is None else head_strides(q_dot_k_shift)),
        sequences.num_heads, sequences.max_seqlen, num_blocks, sequences.rows,
        1 if k_shift is None else sequences.num_heads // k_shift.shape[0], -1.0 if negate else 1.0,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=block_l, LEAD=sequences.lead, ORDER=order, IS_K=is_k,
        HAS_K_SHIFT=k_shift is not None, HAS_KEY_MASK=allowed is not None, VARLEN=sequences.cu_seqlens is not None,
        ROTATE=rotate, FOUR_OVER_SIX=four_over_six, RECIPROCAL=reciprocal,
        STORE_OPERAND=operand, STORE_CODES=codes is not None,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return result


def quantize_tokens(
    x: torch.Tensor,
    sequences: Sequences,
    *,
    allowed: AllowedKeys | None = None,
    quantized: bool = True,
    unquantized: bool = False,
    order: int = 0,
    four_over_six: bool = False,
    reciprocal: bool = False,
    codes: Codes | None = None,
    col_major: bool = False,
) -> list[torch.Tensor]:
    """V, [B, H, L, D] or [total, H, D] of any strides: the operand quantized along the tokens, and the one as it is.

    Those that are asked for, and `codes` if given, by rows or `col_major` (`Codes.shapes`). `order` as in `quantize_rows`; codes
    are always in the order of the slots.
    """
    head_dim, block_d = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    # One warp holds whole groups of 16 tokens, so that their maxima are found without shared memory.
    block_c = min(block_d, 64)
    block_l = min(PAD, 1024 // block_c)
    num_blocks = sequences.blocks(block_l)
    shape, dtype = (sequences.all_rows, block_d), operand_dtype(x.dtype)
    operands = [x.new_empty(shape, dtype=dtype) if wanted else None for wanted in (quantized, unquantized)]
    quantize_tokens_kernel[(sequences.batch * sequences.num_heads * num_blocks, block_d // block_c)](
        x, *key_mask_pointers(allowed), sequences.cu_seqlens, *operands, *(codes or (None, None)),
        *strides_of(x), key_mask_stride(allowed),
        sequences.num_heads, sequences.max_seqlen, num_blocks, sequences.rows,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_C=block_c, BLOCK_L=block_l, LEAD=sequences.lead,
        HAS_KEY_MASK=allowed is not None, VARLEN=sequences.cu_seqlens is not None,
        FOUR_OVER_SIX=four_over_six, RECIPROCAL=reciprocal, ORDER=order,
        STORE_QUANTIZED=quantized, STORE_UNQUANTIZED=unquantized, STORE_CODES=codes is not None, COL_MAJOR=col_major,
        num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return [operand for operand in operands if operand is not None]


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


def unpack(stored: Codes, dtype: torch.dtype, *, along_tokens: bool) -> torch.Tensor:
    """The operand of these values, slots in their own order; groups lie along the tokens (V) or along the head dim (Q, K)."""
    codes, scales = stored
    head_dim = codes.shape[1] if along_tokens else codes.shape[1] * 2
    rows, block_d = codes.shape[0] * (2 if along_tokens else 1), triton.next_power_of_2(head_dim)
    operand = codes.new_empty((rows, block_d), dtype=dtype)
    block_l = _block_l(block_d)
    unpack_kernel[(rows // block_l,)](
        codes, scales, operand,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_L=block_l, ALONG_TOKENS=along_tokens, num_warps=4,
    )  # fmt: skip
    return operand


def _block_l(block_d: int) -> int:
    """Slots of a tile."""
    return min(PAD, max(GROUP_SIZE, _ELEMENTS // block_d))
