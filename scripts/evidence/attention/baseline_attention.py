"""Attention of a baseline, with its gradient. Eager only."""

from __future__ import annotations

import torch

from qat_kernels.arguments import validate
from qat_kernels.reference import accumulator
from qat_kernels.spec import NVFP4
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
    validate(q, k, v, NVFP4, key_mask, None, None, "eager")
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
        mean = None
        if baseline.smooth_q:
            mean = dense.block_means(query)
            query = query - dense.to_rows(mean, query.shape[2])
        return dense.attend(query, key, value, mean, dense.Call(key_mask, positions, scale, baseline)).to(q.dtype)


def _from_the_first_allowed(key_mask: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The first allowed key of each sequence [B, 1]; mask, keys and values with that key first, zero where excluded."""
    length = key_mask.shape[1]
    first = key_mask.int().argmax(1, keepdim=True)
    # What wraps around is excluded, being before the first allowed key.
    order = (torch.arange(length, device=key_mask.device) + first) % length
    key_mask = key_mask.gather(1, order)
    reordered = (x.gather(2, order[:, None, :, None].expand_as(x)) for x in tensors)
    return [first, key_mask, *(torch.where(key_mask[:, None, :, None], x, 0.0) for x in reordered)]
