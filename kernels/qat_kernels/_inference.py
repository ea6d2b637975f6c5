"""Attention without gradients on FP4 matrix units: docs/NUMERICS.md, sections 3 and 4, with both products by `tl.dot_scaled`.

Q and K arrive packed along the head dim, V along the tokens; P~ is quantized and packed on the chip. With NATIVE off the same
kernel multiplies the exact values in BF16. The training forward, which reads those values from memory, has less to do then: this
is how the kernel is tested where there are no FP4 units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._nvfp4 import GROUP, P_GAIN, dot, magnitude_bits, narrow, round_to_e2m1, round_to_e4m3, scale_bits, scale_of, value_of

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
"""Triton's version."""
LN_2 = tl.constexpr(0.6931471805599453)
_TOP = tl.constexpr(6.0)
# Pairs of float32 to bytes, four bytes a call: the even element of a pair is the lower half of its byte.
_PACK = tl.constexpr(
    """{
    .reg .b8 a, b, c, d;
    cvt.rn.satfinite.e2m1x2.f32 a, $5, $1; cvt.rn.satfinite.e2m1x2.f32 b, $6, $2;
    cvt.rn.satfinite.e2m1x2.f32 c, $7, $3; cvt.rn.satfinite.e2m1x2.f32 d, $8, $4;
    mov.b32 $0, {a, b, c, d};
    }"""
)


@triton.jit
def load_tile(ptrs, rows, columns, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """A tile with zeros where `rows` or `columns` are False."""
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(ptrs, mask=rows[:, None] & columns[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=rows[:, None], other=0.0)
    elif MASK_COLUMNS:
        return tl.load(ptrs, mask=columns[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _values(codes, scales):
    """Packed rows, uint8 [R, C / 2] and E4M3 bytes [R, C / 16] -> bfloat16 [R, C], exact."""
    rows: tl.constexpr = codes.shape[0]
    groups: tl.constexpr = scales.shape[1]
    codes = codes.to(tl.int32)
    x = tl.reshape(tl.join(value_of(codes & 15), value_of(codes >> 4)), (rows, groups, GROUP))
    x = x * scale_of(scales)[:, :, None]
    return narrow(tl.reshape(x, (rows, groups * GROUP)), tl.bfloat16)


@triton.jit
def _scaled_dot(a, a_scale, b, b_scale, acc, NATIVE: tl.constexpr):
    """acc + a b^T of packed rows: uint8 [M, K / 2] and [N, K / 2], E4M3 bytes [M, K / 16] and [N, K / 16]."""
    if NATIVE:
        a_scale, b_scale = a_scale.to(tl.float8e4nv, bitcast=True), b_scale.to(tl.float8e4nv, bitcast=True)
        return tl.dot_scaled(a, a_scale, "e2m1", tl.trans(b), b_scale, "e2m1", acc)
    else:
        return dot(_values(a, a_scale), tl.trans(_values(b, b_scale)), acc)


@triton.jit
def _pack_weights(weights, CONVERT: tl.constexpr):
    """phi of P~ [M, N] with g = 2688, packed: uint8 [M, N / 2] and E4M3 bytes [M, N / 16]. CONVERT: by hardware."""
    rows: tl.constexpr = weights.shape[0]
    keys: tl.constexpr = weights.shape[1]
    groups = tl.reshape(weights, (rows, keys // GROUP, GROUP))
    scale = round_to_e4m3(tl.max(groups, 2, keep_dims=True) * (P_GAIN / _TOP))
    scaled = tl.reshape(groups * (P_GAIN / scale), (rows, keys // 2, 2))
    even, odd = tl.split(scaled)
    if CONVERT:
        codes = tl.inline_asm_elementwise(_PACK, "=r,f,f,f,f,f,f,f,f", [even, odd], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        codes = (magnitude_bits(round_to_e2m1(even)) | (magnitude_bits(round_to_e2m1(odd)) << 4)).to(tl.uint8)
    return codes, tl.reshape(scale_bits(scale, scale > 0), (rows, keys // GROUP))


@triton.jit
def _attend(
    out, total, row_max, q, q_scale,
    k_ptr, k_scale_ptr, v_ptr, v_scale_ptr, v_stride_l, v_stride_d, mask_ptr,
    lower, upper, keys, start, stop, qk_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, KEPT: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr,
    NATIVE: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys from `start` to `stop` in tiles of BLOCK_N: as in _forward.py, on codes and scales.

    QUANTIZE: v holds codes [L / 2, D] and scales [L / 16, D], and `out` takes PF~ VF, 2688 times too large; else v holds values.
    """
    tile = tl.arange(0, BLOCK_N)
    half = tl.arange(0, BLOCK_D // 2)
    group = tl.arange(0, BLOCK_D // GROUP)
    columns = tl.arange(0, BLOCK_D)
    valid = columns < HEAD_DIM
    pair, token_group = tl.arange(0, BLOCK_N // 2), tl.arange(0, BLOCK_N // GROUP)
    for first_key in range(start, stop, BLOCK_N):
        key = first_key + tile
        present = key < keys
        if MASKED:
            present = present & (tl.load(mask_ptr + key, mask=present, other=0) != 0)
        row = key.to(tl.int64)[:, None]
        k_ptrs = k_ptr + row * (HEAD_DIM // 2) + half[None, :]
        k = load_tile(k_ptrs, present, half < HEAD_DIM // 2, BOUNDED, BLOCK_D != HEAD_DIM)
        k_scale_ptrs = k_scale_ptr + row * (HEAD_DIM // GROUP) + group[None, :]
        k_scale = load_tile(k_scale_ptrs, present, group < HEAD_DIM // GROUP, BOUNDED, BLOCK_D != HEAD_DIM)
        scores = _scaled_dot(q, q_scale, k, k_scale, tl.zeros((q.shape[0], BLOCK_N), tl.float32), NATIVE) * qk_scale
        if BOUNDED:
            allowed = key[None, :] < upper[:, None]
            if KEPT:
                allowed = allowed & (key[None, :] >= lower[:, None])
            if MASKED:
                allowed = allowed & present[None, :]
            scores = tl.where(allowed, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.ceil(tl.max(scores, 1)))
        reference = new_max
        if BOUNDED:
            reference = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - reference[:, None])
        rescale = tl.exp2(row_max - reference)
        row_max = new_max
        total = total * rescale + tl.sum(weights, 1)
        out = out * rescale[:, None]
        if QUANTIZE:
            p, p_scale = _pack_weights(weights, CONVERT)
            pairs = (first_key // 2 + pair).to(tl.int64)
            groups = ((first_key + token_group * GROUP) // GROUP).to(tl.int64)
            v_ptrs = v_ptr + pairs[:, None] * HEAD_DIM + columns[None, :]
            v = load_tile(v_ptrs, pairs * 2 < keys, valid, BOUNDED, BLOCK_D != HEAD_DIM)
            v_scale_ptrs = v_scale_ptr + groups[:, None] * HEAD_DIM + columns[None, :]
            v_scale = load_tile(v_scale_ptrs, groups * GROUP < keys, valid, BOUNDED, BLOCK_D != HEAD_DIM)
            if NATIVE:
                v_scale = tl.trans(v_scale).to(tl.float8e4nv, bitcast=True)
                out = tl.dot_scaled(p, p_scale.to(tl.float8e4nv, bitcast=True), "e2m1", v, v_scale, "e2m1", out)
            else:
                out = _scaled_dot(p, p_scale, tl.trans(v), tl.trans(v_scale), out, False)
        else:
            v_offsets = row * v_stride_l + columns[None, :] * v_stride_d
            v = load_tile(v_ptr + v_offsets, present, valid, BOUNDED, BLOCK_D != HEAD_DIM)
            out = dot(narrow(weights, v.dtype), v, out)
    return out, total, row_max


@triton.jit
def inference_kernel(
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, vf_ptr, vf_scale_ptr, v_ptr, mask_ptr, first_ptr, shift_dot_ptr, out_ptr, lse_ptr,
    v_stride_b, v_stride_h, v_stride_l, v_stride_d,
    out_stride_b, out_stride_h, out_stride_l, out_stride_d,
    heads, key_heads, queries, all_keys, q_rows, k_rows, qk_scale, shift_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, QUANTIZE: tl.constexpr, SHIFTED: tl.constexpr,
    NATIVE: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head.

    q, k, vf: codes and E4M3 bytes as `_quantize.Codes` has them, by slot; v and out in any layout; mask uint8 [B, k_rows] by
    slot; the rest as in `attention_forward_kernel`. NATIVE: multiply by `tl.dot_scaled`. CONVERT: P~ is packed by the instruction
    that sm_100 and later have.
    """
    blocks = tl.cdiv(queries, BLOCK_M)
    row_of_heads, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if CAUSAL:  # the longest first
        block = blocks - 1 - block
    head_of_batch = row_of_heads.to(tl.int64)
    batch, head = head_of_batch // heads, head_of_batch % heads
    key_head = head // (heads // key_heads)
    key_head_of_batch = batch * key_heads + key_head
    first = 0
    if MASKED:
        first = tl.load(first_ptr + batch)
        mask_ptr += batch * k_rows
    keys = all_keys - first
    k_row = key_head_of_batch * k_rows
    k_ptr += k_row * (HEAD_DIM // 2)
    k_scale_ptr += k_row * (HEAD_DIM // GROUP)
    v_ptr += batch * v_stride_b + key_head * v_stride_h + tl.cast(first, tl.int64) * v_stride_l
    if QUANTIZE:
        vf_ptr += k_row // 2 * HEAD_DIM
        vf_scale_ptr += k_row // GROUP * HEAD_DIM

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < queries
    half, group = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D // GROUP)
    columns = tl.arange(0, BLOCK_D)
    q_row = (head_of_batch * q_rows + rows)[:, None]
    q = load_tile(q_ptr + q_row * (HEAD_DIM // 2) + half[None, :], inside, half < HEAD_DIM // 2, True, BLOCK_D != HEAD_DIM)
    q_scale_ptrs = q_scale_ptr + q_row * (HEAD_DIM // GROUP) + group[None, :]
    q_scale = load_tile(q_scale_ptrs, inside, group < HEAD_DIM // GROUP, True, BLOCK_D != HEAD_DIM)

    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # As in `attention_forward_kernel`.
    own = rows + (all_keys - queries) - first
    own_first = block * BLOCK_M + (all_keys - queries) - first
    own_last = tl.minimum(own_first + BLOCK_M, keys) - 1
    lower = own & -GROUP
    if CAUSAL and QUANTIZE:
        begin = GROUP
        stop = tl.maximum(own_last & -GROUP, begin)
        full = tl.maximum((own_first & -GROUP) - begin, 0) // BLOCK_N * BLOCK_N + begin
        upper = lower
    elif CAUSAL:
        begin = 0
        stop = tl.maximum(own_last + 1, 0)
        full = tl.maximum(own_first + 1, 0) // BLOCK_N * BLOCK_N
        upper = own + 1
    else:
        begin = 0
        stop = keys
        full = keys // BLOCK_N * BLOCK_N
        upper = rows * 0 + keys
    if MASKED:
        full = begin
    values_ptr = vf_ptr if QUANTIZE else v_ptr
    if not MASKED:
        out, total, row_max = _attend(
            out, total, row_max, q, q_scale, k_ptr, k_scale_ptr, values_ptr, vf_scale_ptr, v_stride_l, v_stride_d, mask_ptr,
            lower, upper, keys, begin, full, qk_scale,
            HEAD_DIM, BLOCK_D, BLOCK_N, False, False, False, QUANTIZE, NATIVE, CONVERT,
        )  # fmt: skip
    out, total, row_max = _attend(
        out, total, row_max, q, q_scale, k_ptr, k_scale_ptr, values_ptr, vf_scale_ptr, v_stride_l, v_stride_d, mask_ptr,
        lower, upper, keys, full, stop, qk_scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, True, False, MASKED, QUANTIZE, NATIVE, CONVERT,
    )  # fmt: skip
    if QUANTIZE:
        out = out * (1.0 / P_GAIN)
    if CAUSAL and QUANTIZE:
        # The kept groups, on tiles of their own that are one group wide: too narrow for FP4 units.
        sink_stop = tl.minimum(tl.maximum(own_last + 1, 0), GROUP)
        out, total, row_max = _attend(
            out, total, row_max, q, q_scale, k_ptr, k_scale_ptr, v_ptr, vf_scale_ptr, v_stride_l, v_stride_d, mask_ptr,
            lower, own + 1, keys, 0, sink_stop, qk_scale,
            HEAD_DIM, BLOCK_D, GROUP, True, False, MASKED, False, False, False,
        )  # fmt: skip
        open_start = tl.maximum(own_first & -GROUP, GROUP)
        out, total, row_max = _attend(
            out, total, row_max, q, q_scale, k_ptr, k_scale_ptr, v_ptr, vf_scale_ptr, v_stride_l, v_stride_d, mask_ptr,
            lower, own + 1, keys, open_start, own_last + 1, qk_scale,
            HEAD_DIM, BLOCK_D, GROUP, True, True, MASKED, False, False, False,
        )  # fmt: skip

    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), (row_max + tl.log2(total)) * LN_2)
    rows_of_all = head_of_batch * queries + rows
    if SHIFTED:
        lse += shift_scale * tl.load(shift_dot_ptr + rows_of_all, mask=inside, other=0.0)
    tl.store(lse_ptr + rows_of_all, lse, mask=inside)
    out_ptr += batch * out_stride_b + head * out_stride_h
    out_offsets = rows.to(tl.int64)[:, None] * out_stride_l + columns.to(tl.int64)[None, :] * out_stride_d
    out = narrow(out / tl.where(empty, 1.0, total)[:, None], out_ptr.dtype.element_ty)
    tl.store(out_ptr + out_offsets, out, mask=inside[:, None] & (columns < HEAD_DIM)[None, :])
