"""Attention of a baseline, with its gradient. Eager only."""

from __future__ import annotations

import torch

from qat_kernels.arguments import validate
from qat_kernels.reference import accumulator, rotated, scale_of_quantized
from qat_kernels.spec import NVFP4, QuantSpec
from scripts.evidence.attention import dense
from scripts.evidence.attention.baselines import Baseline


def baseline_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    baseline: Baseline,
    causal: bool = False,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    k_shift: torch.Tensor | None = None,
    q_means: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a baseline, with its gradient.

    Args:
        q: queries [B, H, Lq, D]; D a multiple of 16; float32, float16, bfloat16 (float64 for tests).
        k, v: keys and values [B, Hk, Lk, D]; H is a multiple of Hk, as in `qat_kernels.attention`.
        baseline: what is computed.
        causal: query i may see key j if j <= i + (Lk - Lq).
        scale: factor of the scores; default D ** -0.5.
        key_mask: bool [B, Lk], True where a key may be seen. Groups along tokens are counted from the first allowed key.
        k_shift: float32 [Hk, D], subtracted from K before it is quantized, as `qat_kernels.attention` does.
        q_means: float32 [H, blocks, D], what Q loses before it is quantized, for each block of 128 queries or, if there is one,
            for all. Its product with the unquantized, shifted K is added to the scores. Instead of `smooth_q`.

    Returns:
        The output in the shape and dtype of `q`; rows that may see no key are 0. Arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or devices do not fit; the message says what was expected.
    """
    validate(q, k, v, NVFP4, key_mask, None, None, None, "eager")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    with torch.autocast(q.device.type, enabled=False):
        positions = torch.arange(q.shape[2], device=q.device)[None] + (k.shape[2] - q.shape[2]) if causal else None
        query, key, value = (x.to(accumulator(q.dtype)) for x in (q, k, v))
        if key_mask is not None and key_mask.numel():
            first, key_mask, key, value = _from_the_first_allowed(key_mask, key, value)
            positions = positions - first if positions is not None else None
        if baseline.smooth_k:
            count = key.shape[2] if key_mask is None else key_mask.sum(1)[:, None, None, None]
            key = key - key.sum(2, keepdim=True) / torch.as_tensor(count).clamp(min=1)
        if k_shift is not None:
            key = key - k_shift[:, None]
        mean = dense.block_means(query) if baseline.smooth_q else _by_block(q_means, query)
        if mean is not None:
            query = query - dense.to_rows(mean, query.shape[2])
        if baseline.rotate:
            spec = QuantSpec(rotate=True)
            query, key = (rotated(x.float(), spec).to(x.dtype) for x in (query, key))
            mean = None if mean is None else rotated(mean.float(), spec).to(mean.dtype)
            scale = scale_of_quantized(scale, q.shape[-1], spec)
        return dense.attend(query, key, value, mean, dense.Call(key_mask, positions, scale, baseline)).to(q.dtype)


def _by_block(q_means: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """[H, blocks, D] as [B, H, blocks of the queries, D]."""
    if q_means is None:
        return None
    blocks = -(-query.shape[2] // dense.SMOOTHING_BLOCK)
    if q_means.shape[1] not in (1, blocks):
        raise ValueError(f"q_means: expected means for {blocks} blocks of queries, or one for all, got {q_means.shape[1]}")
    return q_means.to(query.dtype)[None].expand(query.shape[0], -1, blocks, -1)


def _from_the_first_allowed(key_mask: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The first allowed key of each sequence [B, 1]; mask, keys and values with that key first, zero where excluded."""
    length = key_mask.shape[1]
    first = key_mask.int().argmax(1, keepdim=True)
    # What wraps around is excluded, being before the first allowed key.
    order = (torch.arange(length, device=key_mask.device) + first) % length
    key_mask = key_mask.gather(1, order)
    reordered = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in tensors)
    return [first, key_mask, *(torch.where(key_mask[:, None, :, None], x, 0.0) for x in reordered)]
