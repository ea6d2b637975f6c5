"""Quantized probabilities as the kernels make them: multiplied by the training forward, packed by the inference kernel."""

import torch
import triton
import triton.language as tl

from qat_kernels._inference import pack_weights
from qat_kernels._layout import in_order, to_groups
from qat_kernels._nvfp4 import round_weights


@triton.jit
def _kernel(
    x_ptr, values_ptr, codes_ptr, scales_ptr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ORDER: tl.constexpr, CONVERT: tl.constexpr,
):  # fmt: skip
    rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    groups = to_groups(tl.load(x_ptr + rows * KEYS + keys), ORDER)
    largest = tl.max(tl.max(tl.max(groups, 5, keep_dims=True), 2, keep_dims=True), 4, keep_dims=True)
    tl.store(values_ptr + rows * KEYS + keys, in_order(round_weights(groups, largest)))
    codes, scales = pack_weights(groups, largest, CONVERT, False)
    tl.store(codes_ptr + rows * (KEYS // 2) + tl.arange(0, KEYS // 2)[None, :], codes)
    tl.store(scales_ptr + rows * (KEYS // 16) + tl.arange(0, KEYS // 16)[None, :], scales)


def quantize_weights(x: torch.Tensor, *, order: int, device: str, convert: bool = False) -> tuple[torch.Tensor, ...]:
    """Of P~ float32 [16, N]: PF~ * 2688 as `round_weights` has it, and codes and scales, uint8, as `pack_weights` has them."""
    x = x.to(device)
    codes, scales = (torch.empty(16, x.shape[1] // n, dtype=torch.uint8, device=device) for n in (2, 16))
    values = torch.empty_like(x)
    _kernel[(1,)](x, values, codes, scales, 16, x.shape[1], order, convert, enable_fp_fusion=True)
    return values.cpu(), codes.cpu(), scales.cpu()
