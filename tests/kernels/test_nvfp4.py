"""NVFP4 in eager PyTorch against hand-written values and the oracle: docs/NUMERICS.md, sections 1 and 6."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_kernels import dequantize, fake_quantize, pack, quantize, unpack
from qat_kernels.nvfp4 import scaled_codes
from support.kernels import oracle

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = oracle.E4M3.float()  # position = bit pattern
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def group(*values: float) -> torch.Tensor:
    """One group of 16 that starts with these values and ends in 6, so that its scale is exactly 1."""
    return torch.tensor([*values, *[0.0] * (15 - len(values)), 6.0])


def spread(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Gaussian numbers whose size varies over many binades, from flushed to saturated."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(shape, generator=generator) * 26 - 12
    return (torch.randn(shape, generator=generator) * exponents.exp2()).to(dtype)


def assert_equal_to_oracle(x: torch.Tensor, **options) -> None:
    """Codes, scales and values, bit for bit."""
    quantized = quantize(x, **options)
    values, codes, scales = oracle.phi(x, options.get("axis", -1), *options_of_phi(**options))
    assert quantized.codes.dtype == torch.uint8
    assert quantized.scales.dtype == torch.float8_e4m3fn
    assert torch.equal(quantized.codes, codes)
    torch.testing.assert_close(quantized.scales.double(), scales, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        fake_quantize(x.float(), **options),
        values.float(),
        rtol=1e-7 if options.get("global_scale", 1) != 1 else 0,
        atol=0,
        equal_nan=True,
    )


def options_of_phi(global_scale: float = 1.0, four_over_six: bool = False, **_) -> tuple[float, bool]:
    return global_scale, four_over_six


@pytest.mark.parametrize(
    ("tie", "expected"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_ties_round_to_even_codes_and_neighbours_to_the_nearest(tie, expected, sign):
    tie_ = torch.tensor(tie)
    below, above = (torch.nextafter(tie_, tie_ * end).item() for end in (0.0, 2.0))
    low, high = max(x for x in E2M1 if x < tie), min(x for x in E2M1 if x > tie)
    x = group(sign * below, sign * tie, sign * above)
    codes, scales = quantize(x)
    assert scales.item() == 1.0
    assert fake_quantize(x)[:3].tolist() == [sign * low, sign * expected, sign * high]
    assert codes[:3].tolist() == [E2M1.index(value) + 8 * (sign < 0) for value in (low, expected, high)]


def test_every_code_under_every_scale():
    """Code * scale, negative too, comes back as it went in (the 6 pins the scale), and bfloat16 holds it exactly."""
    values = torch.tensor(E2M1 + [-x for x in E2M1]) * E4M3[1:, None]
    codes, scales = quantize(values)
    assert torch.equal(codes, torch.arange(16, dtype=torch.uint8).expand_as(codes))
    assert torch.equal(scales.view(torch.uint8).flatten(), torch.arange(1, 127, dtype=torch.uint8))
    assert torch.equal(scaled_codes(values), values)
    assert torch.equal(values.bfloat16().float(), values)


def test_ties_under_every_scale():
    ties = torch.tensor([midpoint for midpoint, _ in oracle.E2M1_TIES])
    near = torch.cat([ties, ties.nextafter(ties * 2), ties.nextafter(ties * 0)])
    for part in near.split(15):
        x = torch.cat([part, part.new_full((16 - len(part),), 6.0)]) * E4M3[1:, None]
        assert_equal_to_oracle(x)
        assert_equal_to_oracle(-x)


@pytest.mark.parametrize(("towards", "pick"), [(None, lambda b: b + b % 2), (0.0, lambda b: b), (3e3, lambda b: b + 1)])
def test_scales_round_to_nearest_even(towards, pick):
    """amax / 6 in the middle of two neighbouring E4M3 values, and amax one float32 below and above: division, not * (1 / 6)."""
    bits = torch.arange(1, 126)
    x = torch.zeros(125, 16)
    x[:, 3] = (E4M3[bits] + E4M3[bits + 1]) / 2 * 6
    if towards is not None:
        x[:, 3] = x[:, 3].nextafter(torch.tensor(towards))
    assert quantize(x).scales.view(torch.uint8).flatten().tolist() == pick(bits).tolist()


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (0.0, 2.0**-9),
        (1e-40, 2.0**-9),
        (6 * 2.0**-10 * 0.99, 2.0**-9),
        (6 * 2.0**-9 * 1.49, 2.0**-9),
        (6 * 448.0, 448.0),
        (6 * 449.0, 448.0),
        (6 * 480.0, 448.0),
        (3e38, 448.0),
    ],
)
def test_scales_are_clamped(amax, scale):
    assert quantize(torch.tensor([amax])).scales.item() == scale


@pytest.mark.parametrize("g", [1.0, 2688.0, 0.5])
def test_small_groups_flush_and_large_values_saturate(g):
    limit = 2.0**-11 / g
    assert quantize(torch.tensor([limit * 0.999, -limit * 0.999]), global_scale=g).codes.tolist() == [0, 8]
    assert quantize(torch.tensor([limit * 1.001, -limit * 1.001]), global_scale=g).codes.tolist() == [1, 9]
    largest = 2688 / g
    x = torch.tensor([largest, largest * 1.5, -largest * 100])
    assert fake_quantize(x, global_scale=g).tolist() == pytest.approx([largest, largest, -largest], rel=1e-6)
    assert quantize(x, global_scale=g).codes.tolist() == [7, 7, 15]


def test_the_flush_limit_itself_is_zero():
    assert quantize(torch.tensor([2.0**-11, -(2.0**-11)])).codes.tolist() == [0, 8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [1.0, 2688.0])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 50])
def test_random_tensors_equal_the_oracle(length, g, dtype):
    for axis, shape in enumerate([(length, 3, 4), (3, length, 4), (3, 4, length)]):
        x = spread(*shape, dtype=dtype, seed=length)
        assert_equal_to_oracle(x, axis=axis, global_scale=g)
        assert_equal_to_oracle(x, axis=axis - 3, global_scale=g)


def test_bfloat16_and_gaussian_inputs_equal_the_oracle():
    """Many exact ties: 1 % of the elements of a bfloat16 tensor."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    for each in (x, x.bfloat16(), x.bfloat16() * 100):
        assert_equal_to_oracle(each)


@pytest.mark.parametrize("transform", [lambda x: x.mT, lambda x: x[::2, ::3], lambda x: x[:1].expand(5, -1)])
def test_strides_do_not_matter(transform):
    x = transform(spread(24, 40))
    for axis in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(quantize(x, axis=axis), quantize(x.contiguous(), axis=axis), strict=True))


def test_float64_rounds_to_float32_first():
    """0.25 + 2^-40 is a tie only after rounding to float32."""
    assert quantize(group(0.25).double() + 2.0**-40).codes[0] == 0


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.floats(width=32), max_size=35), st.sampled_from([1.0, 2688.0]))
def test_any_float32_equals_the_oracle(values, g):
    assert_equal_to_oracle(torch.tensor(values, dtype=torch.float32), global_scale=g)


def test_four_over_six_picks_the_scale_with_the_smaller_error():
    only_six_scale_exact = torch.tensor([6.0] + [1.5] * 15)
    only_four_scale_exact = torch.tensor([4.0] * 16)  # 4 / 6 is no e4m3 value; 4 / 4 is
    both_exact = torch.tensor([6.0] * 16)
    for x, scale in ((only_six_scale_exact, 1.0), (only_four_scale_exact, 1.0), (both_exact, 1.0)):
        assert quantize(x, four_over_six=True).scales.item() == scale
        assert torch.equal(fake_quantize(x, four_over_six=True), x)
    assert quantize(only_four_scale_exact).scales.item() == 0.6875
    # 5 lies in the gap between 4 and 6: 1.5 * {4, 3} is nearer to {6, 5} than 1 * {6, 4}, and it is paid for by the rest.
    x = group(*[5.0] * 8)
    assert quantize(x, four_over_six=True).scales.item() == 1.5
    assert quantize(group(5.0, *[1.0] * 14), four_over_six=True).scales.item() == 1.0


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_over_six_equals_the_oracle_and_never_errs_more(axis, dtype):
    x = torch.randn(208, 256, generator=torch.Generator().manual_seed(2)).to(dtype).float()
    codes, scales = quantize(x, axis=axis, four_over_six=True)
    _, expected_codes, expected_scales = oracle.phi(x, axis, four_over_six=True)
    assert torch.equal(codes, expected_codes) and torch.equal(scales.double(), expected_scales)

    def errors(four_over_six: bool) -> torch.Tensor:
        error = fake_quantize(x, axis=axis, four_over_six=four_over_six) - x
        return error.movedim(axis, -1).unflatten(-1, (-1, 16)).square().sum(-1)

    assert (errors(True) <= errors(False) * (1 + 1e-5)).all()
    assert errors(True).sum() < 0.9 * errors(False).sum()


def test_negative_zero_keeps_its_sign():
    codes, scales = quantize(torch.tensor([-0.0, 0.0, -1e-9, 1.0]))
    assert codes.tolist()[:3] == [8, 0, 8]
    assert torch.signbit(dequantize(codes, scales)).tolist() == [True, False, True, False]
    assert torch.signbit(fake_quantize(torch.tensor([-0.0, 0.0, -1e-9, 1.0]))).tolist() == [True, False, True, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"four_over_six": True}, {"global_scale": 2688.0}], ids=str)
def test_not_finite_groups_stay_visible(bad, options):
    x = torch.ones(3, 32)
    x[1, 5] = bad
    codes, scales = quantize(x, **options)
    expected = torch.zeros(3, 2, dtype=torch.bool)
    expected[1, 0] = True
    assert torch.equal(scales.isnan(), expected)
    assert scales.view(torch.uint8)[1, 0] == 0x7F
    assert torch.equal(codes[1, :16] & 7, torch.zeros(16, dtype=torch.uint8))
    visible = expected.repeat_interleave(16, dim=1)
    keywords = {key: value for key, value in options.items() if key == "global_scale"}
    assert torch.equal(dequantize(codes, scales, **keywords).isnan(), visible)
    assert torch.equal(fake_quantize(x, **options).isnan(), visible)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"four_over_six": True}, {"global_scale": 2688.0}], ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_dequantize_of_quantize_is_fake_quantize(dtype, options, axis):
    x = spread(17, 33, 16, dtype=dtype)
    before = x.clone()
    codes, scales = quantize(x, axis=axis, **options)
    fake = fake_quantize(x, axis=axis, **options)
    assert fake.dtype == dtype
    assert torch.equal(fake, dequantize(codes, scales, axis=axis, global_scale=options.get("global_scale", 1.0), dtype=dtype))
    assert torch.equal(x, before)


def test_pack_puts_the_lower_index_in_the_low_nibble():
    codes = torch.tensor([0x1, 0x2, 0xF, 0x8, 0x7], dtype=torch.uint8)
    assert pack(codes).tolist() == [0x21, 0x8F, 0x07]
    assert unpack(torch.tensor([0x21, 0x8F, 0x07], dtype=torch.uint8), 5).tolist() == [0x1, 0x2, 0xF, 0x8, 0x7]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("size", [0, 1, 2, 15, 16, 31])
def test_unpack_inverts_pack(axis, size):
    shape = [3, 4, 5]
    shape[axis] = size
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    packed = pack(codes, axis=axis)
    assert packed.dtype == torch.uint8
    assert packed.shape[axis] == (size + 1) // 2
    assert packed.numel() == codes.numel() // max(size, 1) * ((size + 1) // 2)
    assert torch.equal(unpack(packed, size, axis=axis), codes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(16, dtype=torch.int32)), r"floating-point tensor: got torch.int32, shape \(16,\), axis -1"),
        (lambda: quantize(torch.tensor(1.0)), r"got torch.float32, shape \(\), axis -1"),
        (lambda: quantize(torch.ones(2, 16), axis=2), r"shape \(2, 16\), axis 2"),
        (lambda: fake_quantize(torch.ones(2, 16), axis=-3), r"shape \(2, 16\), axis -3"),
        (
            lambda: dequantize(*quantize(torch.ones(2, 32)), axis=0),
            r"codes of shape \(2, 32\) along axis 0 must have the shape \(1, 32\), got \(2, 2\)",
        ),
        (lambda: unpack(torch.zeros(3, dtype=torch.uint8), 7), r"7 codes take 4 bytes along axis -1, got 3"),
        (lambda: unpack(torch.zeros(3, dtype=torch.uint8), 4), r"4 codes take 2 bytes along axis -1, got 3"),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
