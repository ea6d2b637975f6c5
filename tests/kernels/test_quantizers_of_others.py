"""Codes and scales against the quantizers that servers and their tools use: docs/NUMERICS.md, sections 1 and 9."""

import pytest
import torch

from qat_kernels import quantize, unpack
from support.kernels import oracle

G = [1.0, 4.0]


def spread(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of Gaussian numbers of many sizes, rounded so that some divide into ties; no group that is flushed or saturates."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(512, 128, generator=generator)
    exponents = torch.randint(-4, 6, (512, 1), generator=generator)
    return (((x * 8).round() / 8).where(torch.arange(512)[:, None] % 2 == 0, x) * 2.0**exponents).to(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("global_scale", G)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_modelopt(dtype, global_scale):
    """Some zeros have no sign there, and groups of zeros the scale 1: the same values, in other bits."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    x = spread(dtype)
    theirs, scales, _ = NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=torch.tensor(1 / global_scale), try_tensorrt=False)
    ours = quantize(x, global_scale=global_scale)
    assert x.unflatten(-1, (-1, 16)).abs().amax(-1).min() > 0
    codes, others = (x.masked_fill(x == 8, 0) for x in (ours.codes, unpack(theirs._quantized_data, x.shape[-1])))
    assert torch.equal(codes, others)
    assert torch.equal(ours.scales.float(), scales.float())


@pytest.mark.parametrize("global_scale", G)
def test_compressed_tensors(global_scale):
    """In float32: with 16-bit inputs it rounds once more between its steps."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from compressed_tensors.quantization.lifecycle.forward import quantize as quantize_there
    from compressed_tensors.quantization.utils import calculate_qparams

    x, g = spread(torch.bfloat16).float(), torch.tensor(global_scale)
    args = preset_name_to_scheme("NVFP4", ["Linear"]).weights
    groups = x.unflatten(-1, (-1, 16))
    scales, zero_points = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=g)
    values = quantize_there(x, scales.float(), zero_points, args, global_scale=g)
    ours = quantize(x, global_scale=global_scale)
    assert torch.equal(ours.scales.float(), scales.float())
    table = oracle.E2M1.float()
    assert torch.equal(torch.where(ours.codes > 7, -table[(ours.codes & 7).long()], table[(ours.codes & 7).long()]), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_formula_of_servers(dtype):
    """x * RN(1 / s), and a scale of zero gives zeros; against the oracle, flushed and saturated groups and zeros among them."""
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-24, 14, (2048, 1), generator=generator)
    x = (((torch.randn(2048, 64, generator=generator) * 4).round() / 4) * 2.0**exponents).to(dtype)
    x[7], x[8, 16:32] = 0, -0.0
    x[9, 3], x[10, 20] = torch.nan, torch.inf
    quantized = quantize(x, scale="reciprocal")
    _, codes, scales = oracle.phi(x, -1, rule="reciprocal")
    torch.testing.assert_close(quantized.scales.double(), scales, rtol=0, atol=0, equal_nan=True)
    assert (scales == 0).sum() > 100 and (scales == 448).any()
    known = scales.isfinite().repeat_interleave(16, -1)
    assert torch.equal(quantized.codes[known], codes[known])
    assert (quantized.codes[~known] & 7 == 0).all()
    assert ((quantized.codes & 7 == 0) | (scales.repeat_interleave(16, -1) != 0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_rules_have_the_same_scales_and_move_nothing_but_ties(dtype):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite() & (x.abs().float() >= 6 * 2.0**-9) & (x.abs().float() <= 6 * 448)]
    groups = torch.stack((x, *[torch.zeros_like(x)] * 15), -1)
    divide, reciprocal = (quantize(groups, scale=rule) for rule in ("divide", "reciprocal"))
    assert torch.equal(divide.scales.float(), reciprocal.scales.float())
    spread_x = spread(dtype)
    divide, reciprocal = (quantize(spread_x, scale=rule) for rule in ("divide", "reciprocal"))
    quotient = spread_x.double().abs() / divide.scales.double().repeat_interleave(16, -1)
    moved = divide.codes != reciprocal.codes
    ties = torch.tensor([tie for tie, _ in oracle.E2M1_TIES], dtype=torch.float64)
    assert 0 < moved.float().mean() < 2e-3
    assert torch.isin(quotient[moved], ties).all()
