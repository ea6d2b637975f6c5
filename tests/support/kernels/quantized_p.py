"""Quantized probabilities as the kernels make them: multiplied by the training forward, packed by the inference kernel."""

import torch
import triton
import triton.language as tl

from qat_kernels.fp4.kernel import quantize_p
from qat_kernels.triton.layout import in_order, to_groups
from qat_kernels.triton.nvfp4 import fake_quantize_p


@triton.jit
def _kernel(
    x_ptr, values_ptr, codes_ptr, scales_ptr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ORDER: tl.constexpr, HW_CONVERT: tl.constexpr,
):  # fmt: skip
    rows, keys = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    groups = to_groups(tl.load(x_ptr + rows * KEYS + keys), ORDER)
    group_max = tl.max(tl.max(tl.max(groups, 5, keep_dims=True), 2, keep_dims=True), 4, keep_dims=True)
    tl.store(values_ptr + rows * KEYS + keys, in_order(fake_quantize_p(groups, group_max)))
    codes, scales = quantize_p(groups, group_max, HW_CONVERT, False)
    tl.store(codes_ptr + rows * (KEYS // 2) + tl.arange(0, KEYS // 2)[None, :], codes)
    tl.store(scales_ptr + rows * (KEYS // 16) + tl.arange(0, KEYS // 16)[None, :], scales)


def quantize_probabilities(x: torch.Tensor, *, order: int, device: str, hw_convert: bool = False) -> tuple[torch.Tensor, ...]:
    """Of P~ float32 [16, N]: PF~ * 2688 as `fake_quantize_p` has it, and codes and scales, uint8, as `quantize_p` has them."""
    x = x.to(device)
    codes, scales = (torch.empty(16, x.shape[1] // n, dtype=torch.uint8, device=device) for n in (2, 16))
    values = torch.empty_like(x)
    _kernel[(1,)](x, values, codes, scales, 16, x.shape[1], order, hw_convert, enable_fp_fusion=True)
    return values.cpu(), codes.cpu(), scales.cpu()
