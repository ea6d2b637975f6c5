"""What the backward of docs/NUMERICS.md, section 5, computes before its sums: dO / l and the row sums D.

The reference is reference.py. The backward is three kernels: `quantize.prepare_kernel`, of which this is a
part, dQ (grad_query.py), and dK and dV (grad_key_value.py).
Every gradient is summed by one program in a fixed order: the same bits in every run. P and P~ are recomputed from the quantized
Q and K and the row statistics of the forward (forward.py), so P~ is quantized on the grid that the forward used. dQ needs P
alone; only dV sees the quantized one.

Operands are in the layout of layout.py, but slots in their own order: here a group lies in the rows of a matrix unit's
accumulator, or is not needed. With l, the row sum of P~,
    dV = PF~^T (dO / l)    and    dS = P~ (dO / l V^T - D / l),
so dK/dV reads the scaled gradient dO / l in place of dO (an operand too, bfloat16) and divides no probability. D of that kernel
is the row sum of O' and the rounded dO / l, so that the rows of dS sum to zero as exactly as with dO itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import PAD, first_row, sequence
from .nvfp4 import cast_rn

_PAD = tl.constexpr(PAD)


@triton.jit
def preprocess(
    program, tensors, grad_out_strides, out_hp_strides, num_heads, seqlen_q, num_blocks, q_rows, all_q_rows,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr, STORE_GRAD_OUT: tl.constexpr,
):  # fmt: skip
    """dO / l as an operand, and with STORE_GRAD_OUT dO too; delta float32 [2, all_q_rows]: D, from dO and from dO / l.

    dO and O' have any layout; stats are as `forward.attention_forward_kernel` leaves them.
    """
    grad_out_ptr, out_hp_ptr, stats_ptr, cu_seqlens_q_ptr, scaled_grad_out_ptr, grad_out_operand_ptr, delta_ptr = tensors
    grad_out_stride_b, grad_out_stride_h, grad_out_stride_l, grad_out_stride_d = grad_out_strides
    out_hp_stride_b, out_hp_stride_h, out_hp_stride_l, out_hp_stride_d = out_hp_strides
    batch_head, block = program // num_blocks, program % num_blocks
    batch, head = batch_head // num_heads, batch_head % num_heads
    start, seqlen_q = sequence(cu_seqlens_q_ptr, batch, seqlen_q, VARLEN)
    if block * BLOCK_M >= tl.cdiv(seqlen_q, _PAD) * _PAD:
        return
    rows, columns = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    where = (rows < seqlen_q)[:, None] & (columns < HEAD_DIM_V)[None, :]
    token, column = (start + rows).to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    batch, head = batch.to(tl.int64), head.to(tl.int64)
    grad_out_ptr += batch * grad_out_stride_b + head * grad_out_stride_h
    out_hp_ptr += batch * out_hp_stride_b + head * out_hp_stride_h
    grad_out_ptrs = grad_out_ptr + token * grad_out_stride_l + column * grad_out_stride_d
    grad_out = tl.load(grad_out_ptrs, mask=where, other=0.0).to(tl.float32)
    out_hp = tl.load(out_hp_ptr + token * out_hp_stride_l + column * out_hp_stride_d, mask=where, other=0.0).to(tl.float32)
    row = first_row(batch, head, num_heads, q_rows, start, 0, VARLEN) + rows
    row_max, lse_log2 = tl.load(stats_ptr + row), tl.load(stats_ptr + all_q_rows + row)
    inv_row_sum = tl.where(row_max == float("inf"), 0.0, tl.exp2(row_max - lse_log2))  # 1 / l
    scaled_grad_out = cast_rn(grad_out * inv_row_sum[:, None], scaled_grad_out_ptr.dtype.element_ty)
    tl.store(scaled_grad_out_ptr + row[:, None] * BLOCK_DV + columns[None, :], scaled_grad_out)
    if STORE_GRAD_OUT:
        rounded = cast_rn(grad_out, grad_out_operand_ptr.dtype.element_ty)
        tl.store(grad_out_operand_ptr + row[:, None] * BLOCK_DV + columns[None, :], rounded)
    tl.store(delta_ptr + row, tl.sum(grad_out * out_hp, 1))
    tl.store(delta_ptr + all_q_rows + row, tl.sum(scaled_grad_out.to(tl.float32) * out_hp, 1))
