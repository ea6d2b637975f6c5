"""Attention of docs/NUMERICS.md in eager PyTorch: the specification in code. It also runs where Triton cannot.

Rows of queries are processed in chunks against all of their keys, so memory is linear in the length. Forward and backward
build each chunk with the same function and so see the same quantized probabilities. Arithmetic is float32, and float64
for float64 inputs; the quantization itself is float32 throughout.

Shapes: B batch, H query heads, K key heads, G = H / K query heads that share a key head, D head dim (values may have
another one), r rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import smoothing
from .mask import Bounds, Mask
from .nvfp4 import in_format, p_in_format
from .spec import GROUP_SIZE, HADAMARD_ENTRY, SMOOTH_BLOCK, QuantSpec

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
_SCORES_PER_CHUNK = 1 << 24
"""Scores held at once: 64 MiB of float32."""
_CAUSAL_ROWS = 128
"""The most rows of a chunk that does not see every key. Keys outside all of its bounds are skipped, so short chunks save work."""
_MAX_RESCALE = 126.0
"""Largest exponent by which quantized keys are scaled up beside a dominant kept key. Beyond it they weigh less than 2^-126."""


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    with_out_hp: bool,
    bounds: Bounds | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, sections 3 and 4: O, O' in high precision (empty unless `with_out_hp`) and LSE.

    O and O' are like `query` (`empty_out`); LSE is [B, H, Lq] in the dtype of the arithmetic.

    Raises:
        ValueError: the values of `bounds` are not bounds.
    """
    ops = _prepare(query, key, value, key_mask, k_shift, q_shift, spec, mask, scale, bounds, softcap, sinks)
    return _forward(ops, query, k_shift, scale, with_out_hp)


def forward_cached(
    query: torch.Tensor,
    key_fq: torch.Tensor,
    value_fq: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor,
    positions: torch.Tensor,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    *,
    spec: QuantSpec,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O and LSE of the last tokens of sequences whose keys and values were quantized before: causal `forward`.

    `key_fq` and `value_fq` [B, K, n, D] are its quantized operands; `value` has the values of the kept groups, and anything
    finite elsewhere. `key_bias` [B, K, n] was made with this `q_shift`; without one both are None. All of them, `key_mask`
    [B, n] and `positions` [B, Lq] are counted from each sequence's first allowed key. With a window they may be counted from a
    later group that no query sees.
    """
    dtype = accumulator(query.dtype)
    queries = query.contiguous()
    if spec.formats.query is not None:
        queries = in_format(rotated(_less_shift(queries, q_shift), spec), spec.formats.query)
    ops = _Operands(
        query=queries.to(dtype).unflatten(1, (key_fq.shape[1], -1)),
        key_fq=key_fq,
        value=value,
        value_fq=value_fq,
        key_mask=key_mask,
        lower=None if window is None else positions - (window - 1),
        upper=positions,
        softmax_scale=scale_of_quantized(scale, query.shape[-1], spec),
        spec=spec,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(dtype),
        key_bias=None if key_bias is None else key_bias.to(dtype),
    )
    out, _, lse = _forward(ops, query, k_shift, scale, with_out_hp=False)
    return out, lse


def _forward(
    ops: _Operands, query: torch.Tensor, k_shift: torch.Tensor | None, scale: float, with_out_hp: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    out = empty_out(query, ops.value.shape[-1]).zero_()
    out_hp = torch.empty_like(out).zero_() if with_out_hp else query.new_empty(0)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=ops.query.dtype, device=query.device)
    if ops.sinks is not None:  # of rows without a key
        lse[:] = ops.sinks[:, None]
    for chunk in _chunks(ops):
        values = ops.value_fq[:, :, chunk.columns]
        kept = _kept_product(ops, chunk)
        out[:, :, chunk.rows] = ops.by_head((chunk.p_fq @ values + kept) / chunk.row_sum_safe)
        if with_out_hp:
            out_hp[:, :, chunk.rows] = ops.by_head((_without_kept(ops, chunk) @ values + kept) / chunk.row_sum_safe)
        lse[:, :, chunk.rows] = ops.by_head((chunk.row_max + chunk.row_sum.log2()) * LN_2).squeeze(-1)
    if k_shift is not None:
        shift = k_shift.to(lse.dtype).repeat_interleave(ops.qheads_per_kvhead, dim=0)
        lse += scale * torch.einsum("bhld,hd->bhl", query.to(lse.dtype), shift)
    return out, out_hp, lse


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out_hp: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    bounds: Bounds | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, section 5: dQ, dK, dV and that of the sinks (empty without), in the shapes and dtypes of the inputs.

    `out_hp` is O' of the forward.
    """
    ops = _prepare(query, key, value, key_mask, k_shift, q_shift, spec, mask, scale, bounds, softcap, sinks)
    # Contiguous, as the op's fake implementation promises; value_fq is not.
    grad_query, grad_key, grad_value = (x.new_zeros(x.shape) for x in (ops.query, ops.key_fq, ops.value_fq))
    grad_sinks = (
        query.new_empty(0) if sinks is None or ops.sinks is None else torch.zeros_like(ops.sinks.view(ops.query.shape[1:3]))
    )
    grad_smooth = None if ops.smooth is None else torch.zeros_like(ops.smooth.scores)
    grad_bias = None if ops.key_bias is None else torch.zeros_like(ops.key_bias)
    for chunk in _chunks(ops):
        rows, columns = chunk.rows, chunk.columns
        grad = ops.by_key_head(grad_out[:, :, rows])
        delta = (grad * ops.by_key_head(out_hp[:, :, rows])).sum(-1, keepdim=True)
        p = chunk.p / chunk.row_sum_safe
        grad_p = grad @ ops.value_fq[:, :, columns].mT
        p_fq = chunk.p_fq / chunk.row_sum_safe
        for place, keys, kept in chunk.kept_columns(ops):
            p_fq[..., place] += p[..., place] * kept
            grad_p[..., place] = torch.where(kept, grad @ ops.value[:, :, keys].mT, grad_p[..., place])
        grad_value[:, :, columns] += p_fq.mT @ grad
        grad_scores = p * (grad_p - delta)
        if chunk.slope is not None:
            grad_scores *= chunk.slope
        grad_scores *= ops.softmax_scale
        if chunk.p_sink is not None:
            grad_sinks -= (chunk.p_sink * delta).unflatten(2, (ops.qheads_per_kvhead, -1)).sum((0, 3, 4))
        if grad_smooth is not None:
            grad_smooth.index_add_(
                -2, _block_of(rows, grad_scores.device), grad_scores.unflatten(2, (-1, rows.stop - rows.start))
            )
        if grad_bias is not None:
            grad_bias[:, :, columns] += grad_scores.sum(-2)
        grad_query[:, :, :, rows] = (grad_scores @ ops.key_fq[:, :, columns]).unflatten(2, (ops.qheads_per_kvhead, -1))
        grad_key[:, :, columns] += grad_scores.mT @ ops.query[:, :, :, rows].flatten(2, 3)
    if ops.smooth is not None and grad_smooth is not None:
        grad_query = smoothing.grad_query(grad_query, grad_smooth, ops.smooth.key)
        grad_key = smoothing.grad_key(grad_key, grad_smooth.squeeze(2), ops.smooth.query_mean.squeeze(2))
    if spec.rotate:
        rotation = _hadamard(query.shape[-1], query.device).to(grad_query.dtype)  # symmetric
        grad_query, grad_key = grad_query @ rotation, grad_key @ rotation
    if q_shift is not None and grad_bias is not None:
        grad_bias *= rotation_gain(query.shape[-1], spec)
        grad_key += grad_bias[..., None] * q_shift[:, None].to(grad_key.dtype)
    if key_mask is not None:
        grad_key, grad_value = (_unalign(grad, key_mask) for grad in (grad_key, grad_value))
    grads = grad_query.flatten(1, 2).to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)
    return *grads, grad_sinks if sinks is None else grad_sinks.flatten().to(sinks.dtype)


def tangent(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tangents: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    bounds: Bounds | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    sinks_tangent: torch.Tensor | None = None,
) -> torch.Tensor:
    """docs/NUMERICS.md, section 5: the tangent of O along those of Q, K, V and sinks, like O."""
    ops = _prepare(query, key, value, key_mask, k_shift, q_shift, spec, mask, scale, bounds, softcap, sinks)
    query_tangent, key_tangent, value_tangent, bias_tangent = _prepare_tangents(*tangents, key_mask, q_shift, spec, ops)
    out = empty_out(query, ops.value.shape[-1]).zero_()
    smooth_tangent = None
    if ops.smooth is not None:  # the tangent of the mean of K adds the same to every score of a row, which changes nothing
        mean = smoothing.block_sums(query_tangent) / SMOOTH_BLOCK
        query_tangent = query_tangent - smoothing.per_row(mean, query.shape[2])
        smooth_tangent = mean @ ops.smooth.key.mT + ops.smooth.query_mean @ key_tangent[:, :, None].mT
    for chunk in _chunks(ops):
        rows, columns = chunk.rows, chunk.columns
        scores = query_tangent[:, :, :, rows].flatten(2, 3) @ ops.key_fq[:, :, columns].mT
        scores += ops.query[:, :, :, rows].flatten(2, 3) @ key_tangent[:, :, columns].mT
        if bias_tangent is not None:
            scores += bias_tangent[:, :, None, columns]
        if smooth_tangent is not None:
            scores += smooth_tangent[..., _block_of(rows, scores.device), :].flatten(2, 3)
        scores *= ops.softmax_scale
        if chunk.slope is not None:
            scores *= chunk.slope
        p, p_fq = chunk.p / chunk.row_sum_safe, chunk.p_fq / chunk.row_sum_safe
        mean = (p * scores).sum(-1, keepdim=True)
        if chunk.p_sink is not None and sinks_tangent is not None:
            mean += chunk.p_sink * ops.to_rows(sinks_tangent, rows)
        p_tangent = scores.sub_(mean).mul_(p)
        product: torch.Tensor | float = 0.0
        for place, keys, kept in chunk.kept_columns(ops):
            product = product + (p_tangent[..., place] * kept) @ ops.value[:, :, keys]
            product += (p[..., place] * kept) @ value_tangent[:, :, keys]
        if chunk.kept is not None:
            _fill(ops, p_tangent, chunk.kept, 0.0)
        product = p_tangent @ ops.value_fq[:, :, columns] + p_fq @ value_tangent[:, :, columns] + product
        out[:, :, rows] = ops.by_head(product)
    return out


def empty_out(query: torch.Tensor, head_dim_v: int) -> torch.Tensor:
    """Memory for O: as `query` in shape, dtype and order of its strides, but with the head dim of the values."""
    if head_dim_v == query.shape[-1]:
        return torch.empty_like(query)
    order = sorted(range(query.ndim), key=lambda axis: query.stride(axis), reverse=True)
    return torch.empty_permuted((*query.shape[:-1], head_dim_v), order, dtype=query.dtype, device=query.device)


def gradient_shapes(grad_out: torch.Size, key: torch.Size) -> tuple[torch.Size, torch.Size, torch.Size]:
    """Of dQ, dK and dV: dO has the head dim of V, K that of Q."""
    return torch.Size((*grad_out[:-1], key[-1])), key, torch.Size((*key[:-1], grad_out[-1]))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic, and of LSE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(kw_only=True)
class _Operands:
    """The operands of a call. Keys are counted from the first allowed one (section 3)."""

    query: torch.Tensor  # [B, K, G, Lq, D], quantized
    key_fq: torch.Tensor  # [B, K, Lk, D], quantized
    value: torch.Tensor  # [B, K, Lk, D], zero where excluded
    value_fq: torch.Tensor  # the same, quantized
    key_mask: torch.Tensor | None  # bool [B, Lk], True where allowed
    softmax_scale: float
    spec: QuantSpec
    lower: torch.Tensor | None = None  # the first and the last key that a query sees, [B or 1, Lq]; None: no such bound
    upper: torch.Tensor | None = None
    prefix: int = 0  # keys that every query sees
    softcap: float | None = None
    sinks: torch.Tensor | None = None  # [H], in the dtype of the arithmetic
    key_bias: torch.Tensor | None = None  # [B, K, Lk], in the dtype of the arithmetic; added to the scores of all queries
    smooth: smoothing.Smoothed | None = None
    """By key head: query [B, K, G, Lq, D], key [B, K, 1, Lk, D], query_mean and scores [B, K, G, N, ...]."""

    @property
    def qheads_per_kvhead(self) -> int:
        """G."""
        return self.query.shape[2]

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, K, G * r, n] -> [B, H, r, n]."""
        return x.unflatten(2, (self.qheads_per_kvhead, -1)).flatten(1, 2)

    def by_key_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, r, n] -> [B, K, G * r, n], contiguous, in the dtype of the arithmetic."""
        return x.to(self.query.dtype).unflatten(1, (-1, self.qheads_per_kvhead)).flatten(2, 3).contiguous()

    def to_rows(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """A number for each head, [H] -> [1, K, G * r, 1]."""
        x = x.to(self.query.dtype).view(1, -1, self.qheads_per_kvhead, 1)
        return x.expand(-1, -1, -1, rows.stop - rows.start).flatten(2)[..., None]


@dataclass(kw_only=True)
class _Chunk:
    """Some rows of queries against the keys that they may see. Row-wise tensors are [B, K, G * r, 1]."""

    rows: slice
    columns: slice | torch.Tensor  # which keys: those from `start` to `stop`, and before them the first `head`
    head: int  # 0, or whole groups that hold the prefix
    start: int  # where a group begins
    stop: int
    p: torch.Tensor  # 2^(S - row_max), 0 where excluded; [B, K, G * r, keys]
    p_fq: torch.Tensor  # the same, quantized; 0 where kept
    row_max: torch.Tensor  # ceiled maximum over all allowed keys and the sink; 0 where there is none
    row_sum: torch.Tensor  # the sum of `p`, and of the sink
    p_sink: torch.Tensor | None  # the sink's share of the row
    slope: torch.Tensor | None  # derivative of the soft cap, as `p`
    kept: torch.Tensor | None  # True where a key is kept in high precision, [B or 1, r, keys]

    @property
    def row_sum_safe(self) -> torch.Tensor:
        """A divisor: 1 for rows without a key."""
        return self.row_sum.masked_fill(self.row_sum == 0, 1.0)

    def kept_columns(self, ops: _Operands) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """The ranges that hold kept keys: their places in this chunk, the same as keys, and a mask, as [B, K, G * r, columns]."""
        if self.kept is None:
            return
        assert ops.upper is not None
        open_start = max(int(ops.upper[:, self.rows].min()) // GROUP_SIZE * GROUP_SIZE, self.start)
        spans = [(open_start, self.stop)]
        if self.head or not self.start:  # the sink group is among the keys
            sink_end = min(GROUP_SIZE, self.stop)
            spans = [(0, sink_end), *spans] if open_start > sink_end else [(0, self.stop)]
        for start, stop in spans:
            shift = self.start - self.head if start >= self.start else 0
            place = slice(start - shift, stop - shift)
            yield place, slice(start, stop), self.kept[..., place].repeat(1, ops.qheads_per_kvhead, 1).unsqueeze(1)


def _prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
    bounds: Bounds | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> _Operands:
    dtype, leftpad = accumulator(query.dtype), None
    if bounds is not None:
        bounds.check(key.shape[2])
    if key_mask is not None:
        leftpad, order = _alignment(key_mask)
        key, value = (_align(x, key_mask) for x in (key, value))
        key_mask = key_mask.gather(1, order)  # keys that wrap around are before the first allowed key, so they are excluded
    lower, upper = mask.bounds(query.shape[2], key.shape[2], leftpad, bounds, query.device)
    # Contiguous, because a matrix product of strided operands may sum in another order, and strides must not change bits.
    query, key, value = query.contiguous(), key.float().contiguous(), value.to(dtype).contiguous()
    formats, smooth = spec.formats, None
    if formats.smooth is not None:
        smooth = smoothing.smooth(query, key)
        query, key = smooth.query, smooth.key.float()
        by_key_head = (smooth.query[:, :, None], smooth.key[:, :, None], smooth.query_mean[:, :, None], smooth.scores[:, :, None])
        smooth = smoothing.Smoothed(*(x.to(dtype) for x in by_key_head))
    if k_shift is not None:
        key = key - k_shift[:, None]
    bias = None if q_shift is None else key_bias(key, q_shift, spec, dtype).to(dtype)
    if formats.query is not None:
        query = in_format(rotated(_less_shift(query, q_shift), spec), formats.query)
    query, key = query.to(dtype), in_format(rotated(key, spec), formats.key).to(dtype)
    value_fq = in_format(value, formats.value).to(dtype)
    return _Operands(
        query=query.unflatten(1, (key.shape[1], -1)),
        key_fq=key,
        value=value,
        value_fq=value_fq,
        key_mask=key_mask,
        softmax_scale=scale_of_quantized(scale, query.shape[-1], spec),
        spec=spec,
        lower=lower,
        upper=upper,
        prefix=min(mask.prefix, key.shape[2]),
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(dtype),
        key_bias=bias,
        smooth=smooth,
    )


def _prepare_tangents(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    q_shift: torch.Tensor | None,
    spec: QuantSpec,
    ops: _Operands,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Tangents in the form of their operands in `ops`: aligned, rotated, by key head, never quantized; and of the key bias."""
    if key_mask is not None:
        key, value = (_align(x, key_mask) for x in (key, value))
    query, key, value = (x.to(ops.query.dtype).contiguous() for x in (query, key, value))
    bias = None
    if q_shift is not None:
        bias = (key * q_shift[:, None].to(key.dtype)).sum(-1) * rotation_gain(key.shape[-1], spec)
    if spec.rotate:
        rotation = _hadamard(query.shape[-1], query.device).to(query.dtype)
        query, key = query @ rotation, key @ rotation
    return query.unflatten(1, (key.shape[1], -1)), key, value, bias


def key_bias(key: torch.Tensor, q_shift: torch.Tensor, spec: QuantSpec, dtype: torch.dtype) -> torch.Tensor:
    """docs/NUMERICS.md, section 6: what `q_shift` adds to the scores of QF and KF, float32 [B, K, Lk].

    Args:
        key: float32 [B, K, Lk, D], less `k_shift`, before the rotation.
        dtype: of the arithmetic, in which it is summed.
    """
    # No matrix product: it might round its operands to TF32, and sum in an order that depends on the number of keys.
    products = key.to(dtype) * q_shift[:, None].to(dtype)
    return (products.sum(-1) * rotation_gain(key.shape[-1], spec)).float()


def _less_shift(query: torch.Tensor, q_shift: torch.Tensor | None) -> torch.Tensor:
    """Q [B, H, Lq, D] in float32, less the shift of its key head."""
    if q_shift is None:
        return query.float()
    return query.float() - q_shift.repeat_interleave(query.shape[1] // len(q_shift), dim=0)[:, None]


def rotated(x: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """Queries or keys in float32 before they are quantized: rotated if `spec` says so."""
    return x @ _hadamard(x.shape[-1], x.device) if spec.rotate else x


def scale_of_quantized(scale: float, head_dim: int, spec: QuantSpec) -> float:
    """The factor of the scores of quantized Q and K."""
    return scale / rotation_gain(head_dim, spec)


def rotation_gain(head_dim: int, spec: QuantSpec) -> float:
    """By how much the rotation enlarges products of Q and K; a power of two."""
    return HADAMARD_ENTRY**2 * head_dim if spec.rotate else 1.0


def _chunks(ops: _Operands) -> Iterator[_Chunk]:
    batch, num_heads_k, qheads_per_kvhead, length, _ = ops.query.shape
    keys = ops.key_fq.shape[2]
    if not ops.query.numel():
        return
    if ops.upper is not None and ops.lower is not None:
        keys = min(keys, _width(ops, min(_CAUSAL_ROWS, length)))
    rows = max(1, _SCORES_PER_CHUNK // max(1, batch * num_heads_k * qheads_per_kvhead * keys))
    if ops.upper is not None:
        rows = min(rows, _CAUSAL_ROWS)
    for start in range(0, length, rows):
        chunk = _chunk(ops, slice(start, min(start + rows, length)))
        if chunk is not None:
            yield chunk


def _width(ops: _Operands, rows: int) -> int:
    """At least as many keys as any chunk of this many rows may see."""
    assert ops.lower is not None and ops.upper is not None
    lower, upper = ops.lower.amin(0), ops.upper.amax(0)
    return max(1, ops.prefix + int((upper[rows - 1 :] - lower[: len(lower) - rows + 1]).max()) + 2 * GROUP_SIZE)


def _columns(ops: _Operands, rows: slice) -> tuple[int, int, int]:
    """Which keys these rows may see, in whole groups: the first `head`, and those from `start` to `stop`."""
    start, stop = 0, ops.key_fq.shape[2]
    if ops.upper is not None:
        stop = max(0, min(stop, int(ops.upper[:, rows].max()) + 1))
    if ops.lower is not None:
        start = min(max(0, int(ops.lower[:, rows].min())), stop) // GROUP_SIZE * GROUP_SIZE
    head = -(-ops.prefix // GROUP_SIZE) * GROUP_SIZE
    return (head, start, stop) if head < start else (0, 0 if head else start, stop)


def _chunk(ops: _Operands, rows: slice) -> _Chunk | None:
    """The probabilities of some rows, exact and quantized; None where no key can be allowed."""
    head, start, stop = _columns(ops, rows)
    if start >= stop and not head:
        return None
    device = ops.query.device
    columns: slice | torch.Tensor = slice(start, stop)
    if head:
        columns = torch.cat((torch.arange(head, device=device), torch.arange(start, stop, device=device)))
    allowed = ops.key_mask[:, None] if ops.key_mask is not None else None
    kept = None
    if ops.upper is not None:
        upper = ops.upper[:, rows, None]
        column = columns if isinstance(columns, torch.Tensor) else torch.arange(start, stop, device=device)
        visible = column <= upper
        if ops.lower is not None:
            visible = visible & ((column >= ops.lower[:, rows, None]) | (column < ops.prefix))
        allowed = visible if allowed is None else visible & allowed[..., columns]
        if ops.spec.keeps_groups(True):
            kept = (column < GROUP_SIZE) | (column // GROUP_SIZE == upper.div(GROUP_SIZE, rounding_mode="floor"))
    scores = ops.query[:, :, :, rows].flatten(2, 3) @ ops.key_fq[:, :, columns].mT
    if ops.smooth is not None:
        scores += ops.smooth.scores[..., _block_of(rows, scores.device), :].flatten(2, 3)
    if ops.key_bias is not None:
        scores += ops.key_bias[:, :, None, columns]
    slope = None
    if ops.softcap is None:
        scores *= ops.softmax_scale * LOG2_E
    else:
        scores = scores.mul_(ops.softmax_scale / ops.softcap).tanh_()
        slope = 1.0 - scores.square()
        scores *= ops.softcap * LOG2_E
    if allowed is not None:
        _fill(ops, scores, ~allowed, -torch.inf)
    row_max = scores.amax(-1, keepdim=True).ceil_()
    quantized_max = row_max
    if kept is not None:
        quantized_max = _fill(ops, scores.clone(), kept, -torch.inf).amax(-1, keepdim=True).ceil_()
    sink = None if ops.sinks is None else ops.to_rows(ops.sinks, rows) * LOG2_E
    if sink is not None:
        row_max = torch.maximum(row_max, sink.ceil())
    row_max.masked_fill_(row_max == -torch.inf, 0.0)
    rescale = None  # of the keys that are quantized
    if kept is not None or sink is not None:
        rescale = torch.exp2((row_max - quantized_max).clamp_(max=_MAX_RESCALE))
    p = scores.sub_(row_max).exp2_()
    p_fq = p
    if (how := ops.spec.formats.probabilities) is not None:
        # Codes are relative to the maximum of the quantized keys; kept keys and sinks only rescale, by a power of two.
        rescaled = p if rescale is None else p * rescale
        rescaled = rescaled if kept is None else _fill(ops, rescaled, kept, 0.0)
        p_fq, too_large = p_in_format(rescaled, how)
        p_fq = p_fq.to(p.dtype)
        p_fq /= too_large if rescale is None else too_large * rescale
    row_sum = p.sum(-1, keepdim=True)
    p_sink = None
    if sink is not None:
        p_sink = torch.exp2(sink - row_max)
        row_sum += p_sink
        p_sink /= row_sum
    return _Chunk(
        rows=rows, columns=columns, head=head, start=start, stop=stop, p=p, p_fq=p_fq,
        row_max=row_max, row_sum=row_sum, p_sink=p_sink, slope=slope, kept=kept,
    )  # fmt: skip


def _kept_product(ops: _Operands, chunk: _Chunk) -> torch.Tensor | float:
    """The kept groups' share of P~ V: unquantized probabilities times unquantized values."""
    product: torch.Tensor | float = 0.0
    for place, keys, kept in chunk.kept_columns(ops):
        product = product + (chunk.p[..., place] * kept) @ ops.value[:, :, keys]
    return product


def _block_of(rows: slice, device: torch.device) -> torch.Tensor:
    """The block of smoothing that each of these rows is in."""
    return torch.arange(rows.start, rows.stop, device=device) // SMOOTH_BLOCK


def _without_kept(ops: _Operands, chunk: _Chunk) -> torch.Tensor:
    return chunk.p if chunk.kept is None else _fill(ops, chunk.p.clone(), chunk.kept, 0.0)


def _fill(ops: _Operands, x: torch.Tensor, where: torch.Tensor, value: float) -> torch.Tensor:
    """Fill [B, K, G * r, keys] in place where a [B or 1, r or 1, keys] mask says so."""
    x.unflatten(2, (ops.qheads_per_kvhead, -1)).masked_fill_(where[:, None, None], value)
    return x


def _alignment(key_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first allowed key of each sequence [B, 1], and the order that puts it first [B, Lk] (wrapping around)."""
    length = key_mask.shape[1]
    leftpad = key_mask.int().argmax(1, keepdim=True) if length else key_mask.new_zeros(key_mask.shape[0], 1, dtype=torch.long)
    return leftpad, (torch.arange(length, device=key_mask.device) + leftpad) % max(length, 1)


def _reorder(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(2, order[:, None, :, None].expand_as(x))


def _align(x: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, K, Lk, D] from the first allowed one on, zero where excluded."""
    _, order = _alignment(key_mask)
    return torch.where(key_mask.gather(1, order)[:, None, :, None], _reorder(x, order), 0.0)


def _unalign(grad: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
    """Put gradients [B, K, Lk, D] back into the caller's order of keys, zero where excluded."""
    _, order = _alignment(key_mask)
    return torch.where(key_mask[:, None, :, None], _reorder(grad, order.argsort(1)), 0.0)


def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """The Sylvester-Hadamard matrix of a power-of-two size, with entries +-1/8."""
    matrix = torch.full((1, 1), HADAMARD_ENTRY, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)), 0)
    return matrix
