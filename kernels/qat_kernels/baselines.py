"""Attention as others define it, and with ablated gradients, for experiments. Eager only; no product code imports this.

`Baseline()` is the definition of docs/NUMERICS.md; every field changes one thing about it. Scores of some rows against all of
their keys are held at once, so that each step is one large operation: faster on a GPU than reference.py, for more memory.

Sources: SageAttention3 (arXiv 2505.11594, section 3, and its public preprocessing); Attn-QAT (arXiv 2603.00040, Algorithms 1
to 3) and its public training kernel; docs/NUMERICS.md, sections 5 and 6, for where they differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from .attention import _validate
from .nvfp4 import scaled_codes
from .reference import LOG2_E, _alignment, _reorder, accumulator
from .spec import E2M1_MAX, GROUP_SIZE, NVFP4, P_GLOBAL_SCALE, SCALE_MIN

ValueAxis = Literal["tokens", "head_dim"]
Delta = Literal["twin", "out"]
ValueGradient = Literal["forward", "unquantized", "normalized"]

SMOOTHING_BLOCK = 128
"""Queries that share one mean in SageAttention3's smoothing."""
_SCORES_PER_CHUNK = 1 << 26
"""Scores held at once: 256 MiB of float32, a handful of times."""
_CAUSAL_ROWS = 2 * SMOOTHING_BLOCK
"""Most rows of a causal chunk: the keys behind its last row are never touched."""
_MAX_LIFT = 112.0
"""Largest exponent by which quantized keys are lifted above a dominant kept key, so that g times it is finite in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """What one attention call quantizes, on which grid, and which of its gradients are ablated.

    Raises:
        ValueError: a field has an unknown value, or has no effect because P is not quantized.
    """

    quantize_qk: bool = True
    """Whether Q and K are rounded to NVFP4."""
    quantize_p: bool = True
    """Whether the probabilities are."""
    quantize_v: bool = True
    """Whether V is."""
    smooth_q: bool = False
    """SageAttention3: subtract from Q the mean of each block of 128 queries before it is quantized, and add the product of
    that mean with the unquantized (smoothed) K to the scores. A last, shorter block has the mean of its own queries."""
    smooth_k: bool = False
    """SageAttention3: subtract from K its mean over the tokens that may be seen. Not causal: later keys move earlier codes."""
    value_axis: ValueAxis = "tokens"
    """The axis of the groups of V."""
    kept_groups: bool = True
    """Causal calls: whether the open and the sink group stay in high precision (docs/NUMERICS.md, section 4)."""
    integer_max: bool = True
    """Whether P~ = 2^(S - m) is taken against the ceiled maximum m; the public kernels take the maximum itself. (Theirs is a
    running one, that of the tiles so far; here it is that of the row.)"""
    p_global_scale: float = P_GLOBAL_SCALE
    """g of P~: 2688 is two-level quantization, 1 the single level of the paper's algorithms."""
    scale_floor: bool = True
    """Whether scales are at least 2^-9. Without, a group whose scale rounds to zero is zero (Q, K, V and P)."""
    delta: Delta = "twin"
    """D = rowsum(dO * O') from the high-precision `twin` O', or from the quantized `out` O."""
    value_gradient: ValueGradient = "forward"
    """dV = X^T dO, where X is the P that the `forward` multiplied V by, the `unquantized` P, or the `normalized` P rounded anew
    as the public kernel does: g = 1, no floor of the scales."""

    def __post_init__(self) -> None:
        choices = {"value_axis": ValueAxis, "delta": Delta, "value_gradient": ValueGradient}
        for name, choice in choices.items():
            if getattr(self, name) not in get_args(choice):
                expected = ", ".join(get_args(choice))
                raise ValueError(f"Baseline.{name}: expected one of {expected}, got {getattr(self, name)!r}")
        if not self.p_global_scale > 0:
            raise ValueError(f"Baseline.p_global_scale: expected a positive number, got {self.p_global_scale!r}")
        if not self.quantize_p:
            for name in ("integer_max", "p_global_scale", "delta", "value_gradient"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ValueError(f"Baseline.{name}: has no effect with quantize_p=False; leave it out")


_PUBLIC = {"kept_groups": False, "integer_max": False, "p_global_scale": 1.0, "scale_floor": False}
BASELINES: dict[str, Baseline] = {
    "definition": Baseline(),
    "sage3": Baseline(smooth_q=True, smooth_k=True, kept_groups=False, integer_max=False, scale_floor=False),
    "public_training": Baseline(**_PUBLIC, value_axis="head_dim", value_gradient="normalized"),
    "public_training_exact": Baseline(**_PUBLIC, value_axis="head_dim"),
    "public_serving": Baseline(**_PUBLIC, value_gradient="normalized"),
    "single_level": Baseline(p_global_scale=1.0),
    "single_level_no_floor": Baseline(p_global_scale=1.0, scale_floor=False),
    "v_along_head_dim": Baseline(value_axis="head_dim"),
    "no_kept_groups": Baseline(kept_groups=False),
    "d_from_o": Baseline(delta="out"),
    "p_unquantized_in_dv": Baseline(value_gradient="unquantized"),
    "normalized_p_backward": Baseline(value_gradient="normalized"),
    "p_only": Baseline(quantize_qk=False, quantize_v=False),
    "v_only": Baseline(quantize_qk=False, quantize_p=False),
}
"""By name. `definition` is what the others are compared with, in the same implementation. The next four are what others
publish, forward and backward, one of them with the exact straight-through gradient of its forward; then four that change the
definition's grid; three ablate its gradient; two quantize a part. SageAttention3 has no backward: here it is straight-through,
from the twin."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    baseline: Baseline,
    causal: bool = False,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a baseline, with its gradient.

    Args:
        q: queries [B, H, Lq, D]; D a multiple of 16; float32, float16, bfloat16 (float64 for tests).
        k, v: keys and values [B, Hk, Lk, D]; H is a multiple of Hk, as in `qat_kernels.attention`.
        baseline: what is computed.
        causal: query i may see key j if j <= i + (Lk - Lq).
        scale: factor of the scores; default D ** -0.5.
        key_mask: bool [B, Lk], True where a key may be seen. Groups along tokens are counted from the first allowed key.

    Returns:
        The output in the shape and dtype of `q`; rows that may see no key are 0. Arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message says what was expected.
    """
    _validate(q, k, v, NVFP4, key_mask, None, None, "eager")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        positions = torch.arange(q.shape[2], device=q.device)[None] + (k.shape[2] - q.shape[2]) if causal else None
        query, key, value = (x.to(accumulator(q.dtype)) for x in (q, k, v))
        if key_mask is not None:
            first, order = _alignment(key_mask)
            key_mask = key_mask.gather(1, order)
            key, value = (torch.where(key_mask[:, None, :, None], _reorder(x, order), 0.0) for x in (key, value))
            positions = positions - first if causal else None
        if baseline.smooth_k:
            count = key.shape[2] if key_mask is None else key_mask.sum(1)[:, None, None, None]
            key = key - key.sum(2, keepdim=True) / torch.as_tensor(count).clamp(min=1)
        mean = None
        if baseline.smooth_q:
            blocks = query.split(SMOOTHING_BLOCK, 2)
            mean = torch.stack([block.mean(2) for block in blocks], 2)
            query = query - _to_rows(mean, query.shape[2])
        return _Attention.apply(query, key, value, mean, _Call(key_mask, positions, scale, baseline)).to(q.dtype)


class _Call(NamedTuple):
    """What a call is told beside Q, K and V; keys counted from the first allowed one."""

    key_mask: torch.Tensor | None  # bool [B, Lk]
    positions: torch.Tensor | None  # causal: each query's own place among the keys, [B or 1, Lq]
    scale: float
    baseline: Baseline


class _Attention(torch.autograd.Function):
    """Q (without its block means, if there are any), K, V and the block means -> O. The backward computes P again."""

    @staticmethod
    def forward(ctx: Any, query, key, value, mean, call: _Call) -> torch.Tensor:
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
        query, key, value, mean, out = ctx.saved_tensors
        ops = _Operands(query, key, value, mean, ctx.call)
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

    def __init__(self, query, key, value, mean, call: _Call) -> None:
        self.call, self.baseline, self.scale = call, call.baseline, call.scale
        self.group = query.shape[1] // key.shape[1]
        self.query, self.key, self.value, self.mean = query, key, value, mean
        self.key_fq = self._rounded(key, -1, self.baseline.quantize_qk)
        self.query_rounded = self._rounded(query, -1, self.baseline.quantize_qk)
        self.value_fq = self._rounded(value, {"tokens": -2, "head_dim": -1}[self.baseline.value_axis], self.baseline.quantize_v)
        self.value_error = value - self.value_fq  # what kept groups get back

    def _rounded(self, x: torch.Tensor, axis: int, quantize: bool) -> torch.Tensor:
        return _round(x, axis, self.baseline.scale_floor) if quantize else x

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
        rows = max(1, _SCORES_PER_CHUNK // max(1, batch * heads * keys * SMOOTHING_BLOCK)) * SMOOTHING_BLOCK
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
            shift = self.by_key_head(_to_rows(self.by_head(correction), rows.stop - rows.start)).flatten(0, 1)
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
        """dV += P^T dO with the P of the rule; kept groups are unquantized whatever the rule. Consumes the weights."""
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


def _round(x: torch.Tensor, axis: int, scale_floor: bool) -> torch.Tensor:
    """NVFP4 and back along `axis`, with or without the lower clamp of the scales."""
    if not scale_floor:
        # A scale that the clamp would raise is one that rounds to zero: 2^-10 is the tie, and goes to the even one, zero.
        size = x.shape[axis]
        groups = F.pad(x.movedim(axis, -1), (0, -size % GROUP_SIZE)).unflatten(-1, (-1, GROUP_SIZE))
        zero = groups.abs().amax(-1, keepdim=True).float() / E2M1_MAX <= SCALE_MIN / 2
        x = x.masked_fill(zero.expand_as(groups).flatten(-2)[..., :size].movedim(-1, axis), 0.0)
    return scaled_codes(x, axis=axis).to(x.dtype)


def _blocks(rows: slice) -> slice:
    """The smoothing blocks of some rows, which begin with a block."""
    return slice(rows.start // SMOOTHING_BLOCK, -(-rows.stop // SMOOTHING_BLOCK))


def _to_rows(by_block: torch.Tensor, rows: int) -> torch.Tensor:
    """[B, H, blocks, n] -> [B, H, rows, n]: each block's own for each of its rows."""
    return by_block.repeat_interleave(SMOOTHING_BLOCK, 2)[:, :, :rows]
