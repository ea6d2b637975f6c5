"""Attention of a baseline, forward and backward: scores of some rows against all of their keys at once.

Each step is one large operation, which is faster on a GPU than reference.py, for more memory. The straight-through gradient is
written out: autograd would keep every matrix of scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from qat_kernels.nvfp4 import scaled_codes
from qat_kernels.reference import LOG2_E
from qat_kernels.spec import E2M1_MAX, GROUP_SIZE, SCALE_MIN
from scripts.evidence.attention.baselines import Baseline

SMOOTHING_BLOCK = 128
"""Queries that share one mean in SageAttention3's smoothing."""
SCORES_PER_CHUNK = 1 << 26
"""Scores held at once: 256 MiB of float32, a handful of times."""
_CAUSAL_ROWS = 2 * SMOOTHING_BLOCK
"""Most rows of a causal chunk: the keys behind its last row are never touched."""
_MAX_LIFT = 112.0
"""Largest exponent by which quantized keys are lifted above a dominant kept key, so that g times it is finite in float32."""


class Call(NamedTuple):
    """The arguments of a call besides Q, K and V. Keys are counted from the first allowed one."""

    key_mask: torch.Tensor | None  # bool [B, Lk]
    positions: torch.Tensor | None  # causal: each query's own place among the keys, [B or 1, Lq]
    scale: float
    baseline: Baseline


def attend(query, key, value, mean: torch.Tensor | None, call: Call) -> torch.Tensor:
    """O [B, H, Lq, D] of Q and K as they are to be quantized, V, and the block means [B, H, blocks, D] that Q has lost, if any.

    All are float32 or float64; keys of excluded slots may hold anything finite.
    """
    return _Attention.apply(query, key, value, mean, call)


class _Attention(torch.autograd.Function):
    """Q (without its block means, if there are any), K, V and the block means -> O. The backward computes P again."""

    @staticmethod
    def forward(ctx: Any, query, key, value, mean, call: Call) -> torch.Tensor:
        ops = _Operands(query, key, value, mean, call)
        out, twin = torch.zeros_like(query), torch.zeros_like(query)
        for chunk in ops.chunks():
            values = ops.value_fq[:, :, : chunk.keys]
            high = chunk.weights @ values
            low = (ops.quantized(chunk) @ values).div_(chunk.unit) if call.baseline.quantize_p else None
            for columns, kept in chunk.kept_columns:
                weights = chunk.weights[..., columns] * kept
                high += weights @ ops.value_error[:, :, columns]
                if low is not None:
                    low += weights @ ops.value[:, :, columns]
            twin[:, :, chunk.rows] = ops.by_head(high / chunk.norm)
            if low is not None:
                out[:, :, chunk.rows] = ops.by_head(low / chunk.norm)
        if not call.baseline.quantize_p:
            out = twin
        ctx.save_for_backward(query, key, value, mean, twin if call.baseline.delta == "twin" else out)
        ctx.call = call
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return _backward(grad_out, *ctx.saved_tensors, ctx.call)


def _backward(grad_out, query, key, value, mean, out, call: Call) -> tuple[torch.Tensor | None, ...]:
    ops = _Operands(query, key, value, mean, call)
    grad_query, grad_key, grad_value = (torch.zeros_like(x) for x in (query, key, value))
    grad_mean = None if mean is None else torch.zeros_like(mean)
    for chunk in ops.chunks():
        keys, grad = chunk.keys, ops.by_key_head(grad_out[:, :, chunk.rows])
        delta = (grad * ops.by_key_head(out[:, :, chunk.rows])).sum(-1, keepdim=True)
        # Norm and scale belong to rows: multiplying them into dO and D instead of P saves passes over all scores.
        factor = ops.scale / chunk.norm
        grad_scores = (grad * factor) @ ops.value_fq[:, :, :keys].mT
        for columns, kept in chunk.kept_columns:
            grad_scores[..., columns] += ((grad * factor) @ ops.value_error[:, :, columns].mT).mul_(kept)
        grad_scores.sub_(delta * factor).mul_(chunk.weights)
        grad_query[:, :, chunk.rows] = ops.by_head(grad_scores @ ops.key_fq[:, :, :keys])
        grad_key[:, :, :keys] += grad_scores.mT @ ops.query_fq(chunk.rows)
        if mean is not None:
            by_block = torch.stack([x.sum(2) for x in ops.by_head(grad_scores).split(SMOOTHING_BLOCK, 2)], 2)
            blocks = _blocks(chunk.rows)
            grad_mean[:, :, blocks] = ops.by_head(ops.by_key_head(by_block) @ key[:, :, :keys])
            grad_key[:, :, :keys] += ops.by_key_head(by_block).mT @ ops.by_key_head(mean[:, :, blocks])
        ops.add_value_gradient(grad_value, chunk, grad)
    return grad_query, grad_key, grad_value, grad_mean, None


class _Chunk(NamedTuple):
    """Some rows of queries against their first `keys` keys. Row-wise tensors are [B, Hk, G * rows, ...]."""

    rows: slice
    keys: int
    weights: torch.Tensor  # 2^(S - maximum), 0 where excluded
    norm: torch.Tensor  # the sum of `weights`, 1 where that is 0
    unit: torch.Tensor  # what `weights` are multiplied by before they are rounded
    kept_columns: list[tuple[slice, torch.Tensor]]  # disjoint ranges of keys that hold all kept ones, and which they are


class _Operands:
    """Quantized Q, K and V of a call, and the probabilities made of them."""

    def __init__(self, query, key, value, mean, call: Call) -> None:
        self.call, self.baseline, self.scale = call, call.baseline, call.scale
        self.group = query.shape[1] // key.shape[1]
        self.query, self.key, self.value, self.mean = query, key, value, mean
        self.key_fq = self._rounded(key, -1, self.baseline.quantize_qk)
        self.query_rounded = self._rounded(query, -1, self.baseline.quantize_qk)
        self.value_fq = self._rounded(value, {"tokens": -2, "head_dim": -1}[self.baseline.value_axis], self.baseline.quantize_v)
        self.value_error = value - self.value_fq  # what kept groups get back

    def _rounded(self, x: torch.Tensor, axis: int, quantize: bool) -> torch.Tensor:
        return _round(x, axis, self.baseline.scale_floor, self.baseline.four_over_six) if quantize else x

    def query_fq(self, rows: slice) -> torch.Tensor:
        return self.by_key_head(self.query_rounded[:, :, rows])

    def by_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, Hk, G * r, n] -> [B, H, r, n]."""
        return x.unflatten(2, (self.group, -1)).flatten(1, 2)

    def by_key_head(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, r, n] -> [B, Hk, G * r, n]."""
        return x.unflatten(1, (-1, self.group)).flatten(2, 3)

    def chunks(self) -> Iterator[_Chunk]:
        (batch, heads, length, _), keys = self.query.shape, self.key.shape[2]
        if not self.query.numel():
            return
        # Whole blocks, so that a block's mean belongs to one chunk.
        rows = max(1, SCORES_PER_CHUNK // max(1, batch * heads * keys * SMOOTHING_BLOCK)) * SMOOTHING_BLOCK
        if self.call.positions is not None:
            rows = min(rows, _CAUSAL_ROWS)
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            visible = keys if self.call.positions is None else min(keys, keys - length + stop)
            if visible > 0:
                yield self._chunk(slice(start, stop), visible)

    def _chunk(self, rows: slice, keys: int) -> _Chunk:
        scores = self._scores(rows, keys)
        kept_columns = self._mask(scores, rows, keys)
        row_max = self._maximum([scores])
        row_max.masked_fill_(row_max == -torch.inf, 0.0)
        unit = torch.full_like(row_max, self.baseline.p_global_scale)
        if kept_columns and self.baseline.quantize_p:
            # The grid is that against the maximum of the keys that are not kept.
            parts = [scores[..., columns].masked_fill(kept, -torch.inf) for columns, kept in kept_columns]
            ends = [0, *(columns.stop for columns, _ in kept_columns)]
            parts += [scores[..., end : columns.start] for end, (columns, _) in zip(ends, kept_columns, strict=False)]
            unit *= torch.exp2((row_max - self._maximum(parts)).clamp_(max=_MAX_LIFT))
        weights = scores.sub_(row_max).exp2_()
        norm = weights.sum(-1, keepdim=True)
        return _Chunk(rows, keys, weights, norm.masked_fill_(norm == 0, 1.0), unit, kept_columns)

    def _scores(self, rows: slice, keys: int) -> torch.Tensor:
        """S, in base 2: [B, Hk, G * rows, keys]."""
        query, key, factor = self.query_fq(rows), self.key_fq[:, :, :keys], self.scale * LOG2_E
        shift, beta = query.new_empty(1, 1, 1), 0.0
        if self.mean is not None:
            correction = self.by_key_head(self.mean[:, :, _blocks(rows)]) @ self.key[:, :, :keys].mT
            shift = self.by_key_head(to_rows(self.by_head(correction), rows.stop - rows.start)).flatten(0, 1)
            beta = factor
        product = torch.baddbmm(shift, query.flatten(0, 1), key.flatten(0, 1).mT, beta=beta, alpha=factor)
        return product.unflatten(0, query.shape[:2])

    def quantized(self, chunk: _Chunk) -> torch.Tensor:
        """P~ on its grid, times the chunk's unit; 0 where kept."""
        scaled = chunk.weights.float() * chunk.unit.float()
        for columns, kept in chunk.kept_columns:
            scaled[..., columns].masked_fill_(kept, 0.0)
        return _round(scaled, -1, self.baseline.scale_floor).to(chunk.weights.dtype)

    def add_value_gradient(self, grad_value: torch.Tensor, chunk: _Chunk, grad: torch.Tensor) -> None:
        """dV += P^T dO with the P of the rule; kept groups are unquantized under every rule. Consumes the weights."""
        target, rule, grad_norm = grad_value[:, :, : chunk.keys], self.baseline.value_gradient, grad / chunk.norm
        if rule == "unquantized" or not self.baseline.quantize_p:
            target += chunk.weights.mT @ grad_norm
            return
        for columns, kept in chunk.kept_columns:
            target[:, :, columns] += (chunk.weights[..., columns] * kept).mT @ grad_norm
        if rule == "forward":
            target += self.quantized(chunk).mT @ (grad_norm / chunk.unit)
            return
        probabilities = _round(chunk.weights.div_(chunk.norm), -1, scale_floor=False)
        for columns, kept in chunk.kept_columns:
            probabilities[..., columns].masked_fill_(kept, 0.0)
        target += probabilities.mT @ grad

    def _maximum(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Of the rows of scores that lie in several parts, rounded up if the baseline says so."""
        top = torch.cat([part.amax(-1, keepdim=True) for part in parts if part.shape[-1]], -1).amax(-1, keepdim=True)
        return top.ceil_() if self.baseline.integer_max else top

    def _mask(self, scores: torch.Tensor, rows: slice, keys: int) -> list[tuple[slice, torch.Tensor]]:
        """Exclude what may not be seen, and return the kept columns of the chunk."""
        mask, positions = self.call.key_mask, self.call.positions
        if positions is None:
            if mask is not None:
                scores.masked_fill_(~mask[:, None, None, :keys], -torch.inf)
            return []
        own, column = positions[:, rows, None], torch.arange(keys, device=positions.device)
        allowed = column <= own
        # Before the first query's own key nothing is excluded: as far as the host knows without asking the device.
        first = 0
        if mask is None:
            first = max(0, rows.start + self.key.shape[2] - self.query.shape[2])
        else:
            allowed = allowed & mask[:, None, :keys]
        scores[..., first:].masked_fill_(self._by_row(~allowed[..., first:]), -torch.inf)
        if not self.baseline.kept_groups:
            return []
        kept = (column < GROUP_SIZE) | (column // GROUP_SIZE == own.div(GROUP_SIZE, rounding_mode="floor"))
        open_start = first // GROUP_SIZE * GROUP_SIZE
        spans = [slice(0, GROUP_SIZE), slice(open_start, keys)] if open_start > GROUP_SIZE else [slice(0, keys)]
        return [(columns, self._by_row(kept[..., columns])) for columns in spans]

    def _by_row(self, mask: torch.Tensor) -> torch.Tensor:
        """[B or 1, rows, n] -> [B or 1, 1, G * rows, n]."""
        return mask.repeat(1, self.group, 1).unsqueeze(1)


def _round(x: torch.Tensor, axis: int, scale_floor: bool, four_over_six: bool = False) -> torch.Tensor:
    """NVFP4 and back along `axis`, with or without the lower clamp of the scales."""
    if not scale_floor:
        # A scale that the clamp would raise is one that rounds to zero: 2^-10 is the tie, and goes to the even one, zero.
        size = x.shape[axis]
        groups = F.pad(x.movedim(axis, -1), (0, -size % GROUP_SIZE)).unflatten(-1, (-1, GROUP_SIZE))
        zero = groups.abs().amax(-1, keepdim=True).float() / E2M1_MAX <= SCALE_MIN / 2
        x = x.masked_fill(zero.expand_as(groups).flatten(-2)[..., :size].movedim(-1, axis), 0.0)
    return scaled_codes(x, axis=axis, four_over_six=four_over_six).to(x.dtype)


def _blocks(rows: slice) -> slice:
    """The smoothing blocks of some rows, which begin with a block."""
    return slice(rows.start // SMOOTHING_BLOCK, -(-rows.stop // SMOOTHING_BLOCK))


def block_means(query: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] -> [B, H, blocks, D]; a last, shorter block has the mean of its own queries."""
    return torch.stack([block.mean(2) for block in query.split(SMOOTHING_BLOCK, 2)], 2)


def to_rows(by_block: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, H, blocks, n] -> [B, H, rows, n]: each block's own for each of its rows."""
    return by_block.repeat_interleave(SMOOTHING_BLOCK, 2)[:, :, :rows]
