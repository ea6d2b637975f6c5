"""The attention of docs/NUMERICS.md as Triton kernels: prepares the operands, chooses tiles and launches.

Takes what reference.py takes and returns the same, plus the row statistics that its backward reads. Needs an NVIDIA GPU
from sm_80 on (or Triton's interpreter); imports triton through the modules whose names begin with an underscore.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch

from . import tiles
from ._backward import delta_kernel, grad_key_value_kernel, grad_query_kernel
from ._forward import attention_forward_kernel
from ._nvfp4 import INTERPRET, block_of, quantize_rows, quantize_tokens
from .spec import GROUP_SIZE, HADAMARD_ENTRY, QuantSpec

LOG2_E = math.log2(math.e)
_MIN_ARCH = 80


def check_device(device: torch.device) -> None:
    """Raises ValueError where the kernels cannot run. Under Triton's interpreter they run everywhere."""
    if INTERPRET.value:
        return
    if device.type != "cuda" or torch.version.hip is not None:
        raise ValueError(f"attention: impl='triton': expected tensors on an NVIDIA GPU, got {device}; use impl='eager'")
    if _arch(device) < _MIN_ARCH:
        raise ValueError(f"attention: impl='triton': expected sm_{_MIN_ARCH} or later, got sm_{_arch(device)}; use impl='eager'")


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    *,
    spec: QuantSpec,
    causal: bool,
    scale: float,
    with_twin: bool,
    with_stats: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, sections 3 and 4: O, O', LSE, and the row statistics (O' and statistics empty unless asked for).

    O and O' have the shape, strides and dtype of `query`; LSE is float32 [B, H, Lq]. The statistics, float32 [B, H, 2, Lq], are m
    and the base-2 log-sum-exp of the quantized scores; a row without a quantized key, or without any, has +inf there.

    Raises:
        ValueError: the tensors are not on an NVIDIA GPU from sm_80 on.
    """
    check_device(query.device)
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    out = torch.empty_like(query)
    twin = torch.empty_like(query) if with_twin else query.new_empty(0)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    stats = query.new_empty((batch, heads, 2, queries) if with_stats else 0, dtype=torch.float32)
    if not query.numel() or not keys:
        return out.zero_(), twin.zero_(), lse.fill_(-torch.inf), stats.fill_(torch.inf)
    value = _near(value)
    with _on(query.device):
        ops = _prepare(query, key, value, key_mask, k_shift, spec, scale)
        tile = _tiles(query, causal, key_mask).forward
        attention_forward_kernel[(batch * heads * -(-queries // tile.queries),)](
            ops.query, ops.key, ops.value_fq, value, ops.mask, ops.first, ops.shift_dot, out, twin, lse, stats,
            *value.stride(), *out.stride(), heads, key_heads, queries, keys, ops.scale * LOG2_E, scale,
            HEAD_DIM=head_dim, BLOCK_D=block_of(head_dim), BLOCK_M=tile.queries, BLOCK_N=tile.keys,
            CAUSAL=causal, MASKED=key_mask is not None, QUANTIZE=spec.pv == "nvfp4",
            TWIN=with_twin, STATS=with_stats, SHIFTED=k_shift is not None,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out, twin, lse, stats


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    twin: torch.Tensor,
    stats: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    *,
    spec: QuantSpec,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """docs/NUMERICS.md, section 5: dQ, dK, dV in the shapes and dtypes of the inputs, contiguous.

    `twin` is O' and `stats` are the row statistics of `forward`.
    """
    batch, heads, queries, head_dim = query.shape
    key_heads, keys = key.shape[1:3]
    # With a mask, keys that no query may see are not visited.
    new = torch.empty if key_mask is None else torch.zeros
    grad_query = query.new_empty(query.shape)
    grad_key, grad_value = (new(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    if not query.numel() or not keys:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    value, grad_out = _near(value), _near(grad_out)
    delta = query.new_empty(query.shape[:3], dtype=torch.float32)
    block_d = block_of(head_dim)
    with _on(query.device):
        ops = _prepare(query, key, value, key_mask, k_shift, spec, scale)
        chosen = _tiles(query, causal, key_mask)
        rows = max(16, 2048 // block_d)
        delta_kernel[(batch * heads * -(-queries // rows),)](
            grad_out, twin, delta, *grad_out.stride(), *twin.stride(), heads, queries,
            HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=rows, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        operands = (ops.query, ops.key, ops.value_fq, value, ops.mask, ops.first, grad_out, delta, stats)
        sizes = (*value.stride(), *grad_out.stride(), heads, key_heads, queries, keys)
        scales = (ops.scale * LOG2_E, ops.scale)
        constants = {
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d,
            "CAUSAL": causal,
            "MASKED": key_mask is not None,
            "QUANTIZE": spec.pv == "nvfp4",
            "ROTATE": spec.rotate,
            "enable_fp_fusion": True,
        }
        tile = chosen.grad_query
        grad_query_kernel[(batch * heads * -(-queries // tile.queries),)](
            *operands, grad_query, *sizes, *scales, **constants,
            BLOCK_M=tile.queries, BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = chosen.grad_key_value
        sink = GROUP_SIZE if causal and spec.pv == "nvfp4" else 0  # has a tile of its own
        key_tiles = bool(sink) + -(-max(keys - sink, 0) // tile.keys)
        grad_key_value_kernel[(batch * key_heads * key_tiles,)](
            *operands, grad_key, grad_value, *sizes, key_tiles, *scales, **constants,
            BLOCK_M=tile.queries, BLOCK_N=tile.keys, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return grad_query, grad_key, grad_value


class _Operands(NamedTuple):
    """What forward and backward compute with."""

    query: torch.Tensor  # quantized, in the dtype of the inputs, contiguous, as the next two
    key: torch.Tensor
    value_fq: torch.Tensor | None  # None with BF16 PV
    mask: torch.Tensor | None  # uint8 [B, Lk], contiguous
    first: torch.Tensor | None  # int32 [B]: the first allowed key
    shift_dot: torch.Tensor | None  # float32 [B, H, Lq]: q . k_shift
    scale: float  # of the scores of the quantized Q and K


def _prepare(query, key, value, key_mask, k_shift, spec: QuantSpec, scale: float) -> _Operands:
    mask = first = shift_dot = None
    if key_mask is not None:
        mask = key_mask.contiguous().view(torch.uint8)
        first = mask.argmax(1).to(torch.int32)
    if k_shift is not None:
        k_shift = k_shift.contiguous()
        shift_dot = query.new_empty(query.shape[:3], dtype=torch.float32)
    options = {"rotate": spec.rotate, "four_over_six": spec.four_over_six}
    return _Operands(
        query=quantize_rows(query, shift=k_shift, shift_dot=shift_dot, **options),
        key=quantize_rows(key, shift=k_shift, mask=mask, **options),
        value_fq=quantize_tokens(value, mask=mask, first=first, four_over_six=spec.four_over_six) if spec.pv == "nvfp4" else None,
        mask=mask,
        first=first,
        shift_dot=shift_dot,
        scale=scale / (HADAMARD_ENTRY**2 * query.shape[-1]) if spec.rotate else scale,
    )


def _near(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy if its rows are so far apart that the 32-bit offsets inside a tile of at most 256 rows overflow."""
    return x if 256 * (x.stride(2) + x.stride(3)) < 2**31 else x.contiguous()


def _tiles(query: torch.Tensor, causal: bool, key_mask: torch.Tensor | None) -> tiles.Tiles:
    return tiles.choose(_arch(query.device), query.shape[-1], causal, key_mask is not None, query.element_size())


def _arch(device: torch.device) -> int:
    """80 for sm_80, and so on. On a CPU, where only the interpreter runs, tiles are those of the smallest architecture."""
    if device.type != "cuda":
        return _MIN_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _on(device: torch.device):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
