"""The Triton kernels that quantize, called for one tensor, as the attention launches them."""

import torch
import triton

from qat_kernels.spec import NVFP4Format
from qat_kernels.triton.operands import (
    Codes,
    Layout,
    Sequences,
    allowed_keys,
    given_tensors,
    operand_dtype,
    rows_job,
    together,
    tokens_job,
    unpack_job,
)


def _format(four_over_six: bool, reciprocal: bool) -> NVFP4Format:
    return NVFP4Format(four_over_six=four_over_six, scale="reciprocal" if reciprocal else "divide")


def _operand(x: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    columns = triton.next_power_of_2(x.shape[-1])
    return torch.empty(sequences.all_rows, columns, dtype=operand_dtype(x.dtype), device=x.device)


def quantize_rows(
    x: torch.Tensor,
    sequences: Sequences,
    *,
    is_k: bool,
    order: int = 0,
    mask: torch.Tensor | None = None,
    k_shift: torch.Tensor | None = None,
    q_shift: torch.Tensor | None = None,
    q_dot_k_shift: torch.Tensor | None = None,
    negate: bool = False,
    rotate: bool = False,
    four_over_six: bool = False,
    reciprocal: bool = False,
    codes: Codes | None = None,
    key_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The operand of Q or K; codes, and with `q_shift` the key bias, are written where they are given."""
    given, *_ = given_tensors(mask, k_shift, q_shift, None, None, None)
    operand, shift = _operand(x, sequences), q_shift if k_shift is None else k_shift
    job = rows_job(
        Layout.of(x), sequences, given, _format(four_over_six, reciprocal), is_k=is_k, order=order, negate=negate, rotate=rotate,
        heads_per_shift=1 if shift is None else sequences.num_heads // len(shift), operand=operand.dtype, codes=codes is not None,
    )  # fmt: skip
    if k_shift is not None and not is_k and q_dot_k_shift is None:
        q_dot_k_shift = torch.empty(x.shape[:3], device=x.device)
    if q_shift is not None and is_k and key_bias is None:
        key_bias = torch.empty(sequences.all_rows, device=x.device)
    results = operand, *(codes or (None, None)), q_dot_k_shift, key_bias
    together(job)(((x, k_shift, q_shift, *allowed_keys(mask, sequences), None, *results),))
    return operand


def quantize_tokens(
    x: torch.Tensor,
    sequences: Sequences,
    *,
    order: int = 0,
    mask: torch.Tensor | None = None,
    four_over_six: bool = False,
    reciprocal: bool = False,
    codes: Codes | None = None,
) -> torch.Tensor:
    """The operand of V; codes are written where they are given."""
    given, *_ = given_tensors(mask, None, None, None, None, None)
    operand = _operand(x, sequences)
    job = tokens_job(
        Layout.of(x), sequences, given, _format(four_over_six, reciprocal), order=order, quantized=operand.dtype,
        codes=codes is not None,
    )  # fmt: skip
    together(job)(((x, *allowed_keys(mask, sequences), None, operand, None, *(codes or (None, None))),))
    return operand


def unpack(codes: Codes, sequences: Sequences, head_dim: int, dtype: torch.dtype, *, along_tokens: bool) -> torch.Tensor:
    """The operand that these codes stand for."""
    columns = triton.next_power_of_2(head_dim)
    operand = torch.empty(sequences.all_rows, columns, dtype=dtype, device=codes.codes.device)
    together(unpack_job(sequences, head_dim, dtype, along_tokens=along_tokens))(((*codes, operand),))
    return operand
