"""Operands of the attention kernels, and what they are made of: layout.py says where values lie, quantize.py computes them."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from qat_kernels.mask import Bounds
from qat_kernels.spec import GROUP_SIZE, Formats, NVFP4Format
from qat_kernels.varlen import Packing

from .layout import PAD
from .nvfp4 import INTERPRET
from .precompiled import Launch, Number, Pointer, pointer
from .quantize import allowed_keys_kernel, fake_quantize_kv_kernel, prepare_kernel

PLANS = 1024
"""How many plans are kept: calls with this many different shapes and options cost little on the host."""
_ELEMENTS = 1024
"""Elements of a tile: 32 for each thread of a warp."""


class Layout(NamedTuple):
    """A tensor as kernels are compiled for it: [B, H, L, D], or [total, H, D] of packed sequences."""

    shape: torch.Size
    stride: tuple[int, ...]
    """As PyTorch has it."""
    dtype: torch.dtype
    aligned: bool
    """Whether it begins at a multiple of 16."""

    @classmethod
    def of(cls, x: torch.Tensor) -> Layout:
        """That of a tensor."""
        return cls(x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of batch, heads, tokens and head dim; packed tensors have no batch."""
        return _strides(self.stride)

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
    launch(*map(pointer, (key_mask, allowed, leftpad)))
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
    return _strides(x.stride())


def _strides(stride: tuple[int, ...]) -> tuple[int, ...]:
    return stride if len(stride) == 4 else (0, stride[1], stride[0], stride[2])


def contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    """`strides_of` of a contiguous tensor of this shape."""
    return strides_of(torch.empty(shape, device="meta"))


def head_strides(queries: Sequences) -> tuple[int, int]:
    """Strides of batch and heads of one number for each row: [B, H, L], or [H, total] of packed sequences."""
    return (0 if queries.packed else queries.num_heads * queries.total), queries.total


def order_of(block_n: int) -> int:
    """ORDER for tiles of this many keys."""
    return min(block_n, 64)


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16, which holds quantized values exactly. Under the interpreter float32 stays, so that tests see every bit."""
    return torch.float32 if INTERPRET.value and dtype == torch.float32 else torch.bfloat16


class Given(NamedTuple):
    """Which of the tensors that may be missing are there, and all that kernels are compiled for about them."""

    key_mask: bool = False
    k_shift: bool = False
    q_shift: bool = False
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
        return (self.pointer(torch.int32, self.bounds_stride is not None),) * 2


NOTHING = Given()


def given_tensors(
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    packing: Packing | None,
    bounds: Bounds | None,
    sinks: torch.Tensor | None,
) -> tuple[Given, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """What is there; and as kernels read them: both shifts, lower and upper bounds with as many rows as the longer has, sinks."""
    if key_mask is k_shift is q_shift is packing is bounds is sinks is None:
        return NOTHING, None, None, None, None, None
    lower = upper = bounds_stride = None
    if bounds is not None:
        lower, upper = (x.contiguous() for x in torch.broadcast_tensors(*bounds))
        bounds_stride = lower.shape[1] if len(lower) > 1 else 0
    k_shift, q_shift = (None if x is None else x.contiguous() for x in (k_shift, q_shift))
    sinks = None if sinks is None else sinks.float().contiguous()
    outside = (k_shift, q_shift, lower, upper, sinks, *(() if packing is None else packing[:2]))
    aligned = all(x.data_ptr() % 16 == 0 for x in outside if x is not None)
    given = Given(
        key_mask is not None, k_shift is not None, q_shift is not None, bounds_stride, sinks is not None, aligned
    )  # fmt: skip
    return given, k_shift, q_shift, lower, upper, sinks


def _rounding(how: NVFP4Format | str | None) -> tuple[bool, bool]:
    """FOUR_OVER_SIX and RECIPROCAL of kernels that round to this format."""
    return (how.four_over_six, how.scale == "reciprocal") if isinstance(how, NVFP4Format) else (False, False)


class Job(NamedTuple):
    """A part of the work of `prepare_kernel`."""

    place: int
    """Of its function in the kernel."""
    programs: int
    tensors: tuple[Pointer | None, ...]
    numbers: tuple[Number, ...]
    constants: tuple[Any, ...]


def together(*jobs: Job) -> Launch:
    """One launch of jobs that do not depend on each other. It takes a tuple: for each job one of its tensors."""
    ends = tuple(itertools.accumulate(job.programs for job in jobs))
    constants = tuple((tl.constexpr(job.place), _constexprs(job.constants)) for job in jobs)
    return Launch.of(
        prepare_kernel,
        ends[-1:],
        [tuple(job.tensors for job in jobs)],
        [tuple(job.numbers for job in jobs), ends],
        {"JOBS": constants},
        num_warps=1,
    )


def _constexprs(x: Any) -> Any:
    """As Triton takes constants in a tuple."""
    return tuple(map(_constexprs, x)) if type(x) is tuple else tl.constexpr(x)


def rows_job(
    x: Layout,
    sequences: Sequences,
    given: Given,
    how: NVFP4Format | str | None,
    *,
    is_k: bool,
    heads_per_shift: int = 1,
    order: int = 0,
    negate: bool = False,
    rotate: bool = False,
    operand: torch.dtype | None = None,
    codes: bool = False,
) -> Job:
    """Q or K, of any strides, quantized along the head dim: the operand unless its dtype is None, and `codes` if asked for.

    Its tensors: x, k_shift, q_shift, the key mask by slot and leftpad, cu_seqlens, the operand, codes and scales, q_dot_k_shift,
    and key_bias.

    Args:
        is_k: K, minus `k_shift` float32 [Hk, D]. Otherwise Q, minus `q_shift` float32 [Hk, D].
        heads_per_shift: of x, that share a row of the shifts, if there are some.
        negate: change the sign of Q, and of the key bias; K itself keeps its sign.
        order: ORDER of the operand's rows (layout.py); 0 for slots in their own order. Codes have it only without an operand.
    """
    head_dim, block_d = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    block_l = _block_l(block_d)
    num_blocks = sequences.blocks(block_l)
    key_mask, is_shifted_q = given.key_mask and is_k, given.k_shift and not is_k
    uint8, float32 = Pointer(torch.uint8) if codes else None, Pointer(torch.float32)
    return Job(
        0,
        sequences.batch * sequences.num_heads * num_blocks,
        (
            x.pointer, given.pointer(torch.float32, given.k_shift), given.pointer(torch.float32, given.q_shift),
            *(given.key_mask_pointers() if key_mask else (None, None)),
            given.pointer(torch.int32, sequences.packed), Pointer(operand) if operand else None, uint8, uint8,
            float32 if is_shifted_q else None, float32 if given.q_shift and is_k else None,
        ),
        (
            x.strides, _sizes(sequences, num_blocks, key_mask), head_strides(sequences) if is_shifted_q else (0, 0),
            heads_per_shift,
        ),
        (
            head_dim, block_d, block_l, sequences.lead, order, is_k, negate, given.k_shift, given.q_shift, key_mask,
            sequences.packed, rotate, _rounding(how), operand is not None, codes,
        ),
    )  # fmt: skip


def _sizes(sequences: Sequences, num_blocks: int, key_mask: bool) -> tuple[int, ...]:
    """`sequences` of a kernel."""
    return sequences.num_heads, sequences.max_seqlen, num_blocks, sequences.rows, sequences.rows if key_mask else 0


def tokens_job(
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
) -> Job:
    """V, of any strides: the operand quantized along the tokens and the one as it is, each unless its dtype is None, and `codes`.

    Its tensors: x, the key mask by slot and leftpad, cu_seqlens, both operands, codes and scales: by rows or `col_major`
    (`Codes.shapes`), always in the order of the slots. `order` as in `rows_job`.
    """
    head_dim, block_d = x.shape[-1], triton.next_power_of_2(x.shape[-1])
    block_c, block_l = _columns_and_slots(block_d)
    num_blocks = sequences.blocks(block_l)
    uint8 = Pointer(torch.uint8) if codes else None
    return Job(
        1,
        sequences.batch * sequences.num_heads * num_blocks * (block_d // block_c),
        (
            x.pointer, *given.key_mask_pointers(), given.pointer(torch.int32, sequences.packed),
            *(Pointer(dtype) if dtype else None for dtype in (quantized, unquantized)), uint8, uint8,
        ),
        (x.strides, _sizes(sequences, num_blocks, given.key_mask)),
        (
            head_dim, block_d, block_c, block_l, sequences.lead, given.key_mask, sequences.packed, _rounding(how), order,
            quantized is not None, unquantized is not None, codes, col_major,
        ),
    )  # fmt: skip


def unpack_job(sequences: Sequences, head_dim: int, operand: torch.dtype, *, along_tokens: bool) -> Job:
    """Codes into an operand, slots in their own order; groups lie along the tokens (V) or along the head dim (Q, K).

    Its tensors: codes, scales, and the operand.
    """
    block_d, uint8 = triton.next_power_of_2(head_dim), Pointer(torch.uint8)
    block_c, block_l = _columns_and_slots(block_d) if along_tokens else (block_d, _block_l(block_d))
    constants = (head_dim, block_d, block_c, block_l) if along_tokens else (head_dim, block_d, block_l)
    programs = sequences.all_rows // block_l * (block_d // block_c)
    return Job(3 if along_tokens else 2, programs, (uint8, uint8, Pointer(operand)), (), constants)


def is_operand(x: Layout, sequences: Sequences, operand: torch.dtype) -> bool:
    """Whether a tensor lies in memory as an operand, slots in their own order, would: contiguous, with nothing to pad."""
    _, heads, length, head_dim = x.shape if len(x.shape) == 4 else (0, 0, 0, 0)
    return (
        not sequences.packed
        and x.dtype == operand
        and x.aligned
        and x.stride == (heads * length * head_dim, length * head_dim, head_dim, 1)
        and sequences.rows == length
        and head_dim == triton.next_power_of_2(head_dim)
    )


def preprocess_job(grad_out: Layout, out_hp: Layout, queries: Sequences, given: Given, operand: torch.dtype, copies: bool) -> Job:
    """What the sums of a backward need of dO and O' (preprocess.py); `copies`: a copy of dO, too.

    Its tensors: dO, O', stats, cu_seqlens of Q, the operands of dO / l and of dO, and delta.
    """
    block_d = triton.next_power_of_2(grad_out.shape[-1])
    block_m = _block_l(block_d)
    num_blocks = queries.blocks(block_m)
    float32 = Pointer(torch.float32)
    return Job(
        4,
        queries.batch * queries.num_heads * num_blocks,
        (
            grad_out.pointer, out_hp.pointer, float32, given.pointer(torch.int32, queries.packed),
            Pointer(operand), Pointer(operand) if copies else None, float32,
        ),
        (
            grad_out.strides, out_hp.strides,
            queries.num_heads, queries.max_seqlen, num_blocks, queries.rows, queries.all_rows,
        ),
        (grad_out.shape[-1], block_d, block_m, queries.packed, copies),
    )  # fmt: skip


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
    # Elements of a tile: 32 for each thread of four warps.
    block_l, num_rows = min(PAD, 4096 // block_d), key.numel() // head_dim
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
    """Slots of a tile of whole rows."""
    return min(PAD, _ELEMENTS // block_d)


def _columns_and_slots(block_d: int) -> tuple[int, int]:
    """Of a tile of whole groups along the tokens."""
    columns = min(block_d, 64)
    return columns, min(PAD, _ELEMENTS // columns)
