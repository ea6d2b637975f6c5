"""The Triton quantization kernels against the eager ones, bit for bit: docs/NUMERICS.md, sections 1, 2, 6 and 7."""

import pytest
import torch

from qat_kernels import QuantSpec, nvfp4, pack, quantize, reference
from qat_kernels.nvfp4 import scaled_codes
from support.kernels import oracle
from support.kernels.interpreter import on

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = ({}, {"four_over_six": True})


def spread(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Gaussian numbers whose size varies over many binades, from flushed to saturated."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.rand(shape, generator=generator) * 24 - 12
    return (torch.randn(shape, generator=generator) * exponents.exp2()).to(dtype)


def quantize_on_device(axis: int, x: torch.Tensor, *, device: str, is_k: bool = True, lead: int = 0, order: int = 64, **options):
    """Codes, scales (as bytes) and values of the kernel for `axis`, each tested to be the same when made from the codes.

    Of each head the slots from `lead` on, in their order; what is behind the tokens is tested to be zeros.
    """
    from qat_kernels.triton import operands
    from support.kernels import quantizers

    batch, heads, length, head_dim = x.shape
    along_tokens = axis == -2
    sequences = operands.Sequences(batch, heads, length, length, lead=lead)
    shapes = operands.Codes.shapes(sequences, head_dim, along_tokens=along_tokens)
    codes = operands.Codes(*(torch.full(shape, 99, dtype=torch.uint8, device=device) for shape in shapes))
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    if along_tokens:
        operand = quantizers.quantize_tokens(x.to(device), sequences, order=order, codes=codes, **options)
    else:
        operand = quantizers.quantize_rows(x.to(device), sequences, is_k=is_k, order=order, codes=codes, **options)
    rows = torch.arange(sequences.all_rows)
    if order:  # row 8 j + 2 t + b of each 64 (32) holds register (j, b) of thread t, which has all (half) of a group
        place, threads = rows % order, 64 // order
        j, t, b = place // 8, place // 2 % 4, place % 2
        slots = rows - place + t // threads * 16 + t % threads * (16 // threads) + 2 * j + b
        assert slots.sort().values.equal(rows)
        rows = slots.argsort()
    in_order = operand.cpu()[rows]
    unpacked = quantizers.unpack(codes, sequences, head_dim, operand.dtype, along_tokens=along_tokens).cpu()
    torch.testing.assert_close(unpacked, in_order, rtol=0, atol=0, equal_nan=True)
    values = in_order.view(batch, heads, sequences.rows, -1)
    outside = values.nan_to_num()  # a group that is not finite is NaN to its end
    assert not outside[..., head_dim:].any() and not outside[:, :, lead + length :].any() and not outside[:, :, :lead].any()
    parts = [part.cpu().view(batch, heads, -1, part.shape[1]) for part in codes]
    per_code, per_scale = (2, 16) if along_tokens else (1, 1)
    cut = [
        part[:, :, lead // step : -(-(lead + length) // step)] for part, step in zip(parts, (per_code, per_scale), strict=True)
    ]
    return [*cut, values[:, :, lead : lead + length, :head_dim]]


def quantize_eagerly(axis: int, x: torch.Tensor, **options) -> list[torch.Tensor]:
    codes, scales = quantize(x, axis=axis, **options)
    return [pack(codes, axis=axis), scales.view(torch.uint8), scaled_codes(x, axis=axis, **options)]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Signed zeros included; any NaN equals any other. Values may have a narrower dtype that holds them exactly."""
    for a, b in zip(actual, expected, strict=True):
        b = b.to(a.dtype)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        if a.is_floating_point():
            assert torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())


def share_of_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return min(((a == b) | (a != a) & (b != b)).double().mean().item() for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 33, 48), (1, 2, 130, 16), (1, 1, 17, 128)], ids=str)
def test_codes_scales_and_values_equal_the_eager_ones(shape, dtype, axis, device):
    x = spread(*shape, dtype=dtype)
    x[0, 0, 3, :4] = torch.tensor([0.0, -0.0, torch.nan, 1.0])
    x[0, -1, 16, 1] = -torch.inf
    assert_same_bits(on(device, quantize_on_device, axis, x), quantize_eagerly(axis, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("neighbour", [-1, 0, 1])
def test_ties_and_their_neighbours_under_every_scale(neighbour, axis, device):
    """Each midpoint of two codes times each of the 126 scales, or the float32 next to it; a 6 pins the scale."""
    ties = torch.tensor([midpoint for midpoint, _ in oracle.E2M1_TIES])
    groups = torch.cat([ties, -ties, torch.zeros(1), torch.full((1,), 6.0)]) * oracle.E4M3[1:, None].float()
    if neighbour:
        groups[:, :14] = groups[:, :14].nextafter(groups[:, :14] * (2 if neighbour > 0 else 0))
    groups = torch.cat([groups, groups[:2]])[None, None]  # 128 of them, for a head dim must be a multiple of 16
    x = groups if axis == -1 else groups.mT
    assert_same_bits(on(device, quantize_on_device, axis, x), quantize_eagerly(axis, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_every_scale_is_rounded_as_the_eager_one(axis, device):
    """Maxima at, above and below the midpoints of neighbouring E4M3 values, and beyond both ends."""
    midpoints = (oracle.E4M3[:-1] + oracle.E4M3[1:]).float() / 2
    near = torch.cat([midpoints, midpoints.nextafter(midpoints * 2), midpoints.nextafter(midpoints * 0)])
    amax = torch.cat([near * 6, torch.tensor([0.0, 1e-30, 2e-5, 2688.0, 3000.0, 60000.0])])
    x = torch.zeros(1, 2, 192, 16)
    x[..., 3] = amax.view(2, 192)
    x = x if axis == -1 else x.mT
    assert_same_bits(on(device, quantize_on_device, axis, x), quantize_eagerly(axis, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_over_six(dtype, axis, device):
    x = torch.randn(2, 2, 70, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    x[0] = spread(2, 70, 64).to(dtype)
    actual = on(device, quantize_on_device, axis, x, four_over_six=True)
    assert_same_bits(actual, quantize_eagerly(axis, x, four_over_six=True))
    assert share_of_equal(actual, quantize_eagerly(axis, x)) < 0.9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_values_do_not_depend_on_whether_codes_are_stored(head_dim, dtype, device):
    """A forward with a gradient stores them, one without does not: what is trained is what is served, with every option."""
    x = torch.randn(2, 2, 1000 if device == "cuda" else 70, head_dim, generator=torch.Generator().manual_seed(4)).to(dtype)
    with_codes, without = on(device, operands_with_and_without_codes, x)
    assert torch.equal(with_codes, without)


def operands_with_and_without_codes(x: torch.Tensor, *, device: str) -> list[torch.Tensor]:
    from qat_kernels.triton import operands
    from support.kernels import quantizers

    batch, heads, length, head_dim = x.shape
    sequences = operands.Sequences(batch, heads, length, length)
    shapes = operands.Codes.shapes(sequences, head_dim, along_tokens=False)
    codes = operands.Codes(*(torch.empty(shape, dtype=torch.uint8, device=device) for shape in shapes))
    options = {"is_k": True, "rotate": True, "four_over_six": True}
    return [quantizers.quantize_rows(x.to(device), sequences, codes=given, **options).cpu() for given in (codes, None)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_shift_and_rotation(head_dim, dtype, device):
    """Query heads 2 and 3 read row 1 of a shift of two key heads; coarse inputs make every sum exact."""
    generator = torch.Generator().manual_seed(3)
    x = ((torch.randn(1, 4, 20, head_dim, generator=generator) * 8).round() / 8).to(dtype)
    k_shift = (torch.randn(2, head_dim, generator=generator) * 8).round() / 8
    repeated = k_shift.repeat_interleave(2, 0)[:, None]
    actual = on(device, quantize_on_device, -1, x, k_shift=k_shift, rotate=True)
    expected = quantize_eagerly(-1, reference.rotated(x.float() - repeated, QuantSpec(rotate=True)))
    assert_same_bits(actual, expected)
    assert torch.equal(on(device, dot_with_shift, x, k_shift), (x.float() * repeated).sum(-1))


def dot_with_shift(x: torch.Tensor, k_shift: torch.Tensor, *, device: str) -> torch.Tensor:
    from qat_kernels.triton import operands
    from support.kernels import quantizers

    q_dot_k_shift = torch.empty(x.shape[:3], device=device)
    sequences = operands.Sequences(x.shape[0], x.shape[1], x.shape[2], x.shape[2])
    quantizers.quantize_rows(x.to(device), sequences, is_k=False, k_shift=k_shift.to(device), q_dot_k_shift=q_dot_k_shift)
    return q_dot_k_shift.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("head_dim", "rotate"), [(48, False), (16, True), (128, True)])
def test_shifted_queries_lose_their_shift_and_keys_get_a_bias(head_dim, rotate, device):
    """Of each head in the order of the slots; zero where no key is allowed, also if it holds NaN; coarse inputs, as above."""
    generator = torch.Generator().manual_seed(4)
    q, k = ((torch.randn(2, heads, 20, head_dim, generator=generator) * 8).round() / 8 for heads in (4, 2))
    k_shift, q_shift = (torch.randn(2, 2, head_dim, generator=generator) * 8).round() / 8
    q_shift += 1 / 16  # no difference is zero: Triton 3.6 computes -x as 0 - x, so the sign of a zero is another one
    spec = QuantSpec(rotate=rotate)
    shifted = reference.rotated(-(q - q_shift.repeat_interleave(2, 0)[:, None]), spec)
    actual = on(device, quantize_on_device, -1, q, is_k=False, order=0, q_shift=q_shift, rotate=rotate, negate=True)
    assert_same_bits(actual, quantize_eagerly(-1, shifted))

    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :3], mask[:, 9] = False, False
    expected = reference.key_bias(k - k_shift[:, None], q_shift, spec, torch.float32).masked_fill(~mask[:, None], 0.0)
    expected = torch.stack([expected[0], expected[1].roll(-3, 1)])
    k = k.masked_fill(~mask[:, None, :, None], torch.nan)
    bias = on(device, bias_of_keys, k, mask, k_shift, q_shift, rotate)
    assert torch.equal(bias[0], expected) and torch.equal(bias[1], -expected)


def bias_of_keys(k, mask, k_shift, q_shift, rotate, *, device: str) -> list[torch.Tensor]:
    """As it is, and for a negative scale."""
    from qat_kernels.triton import operands
    from support.kernels import quantizers

    sequences, found = operands.Sequences(k.shape[0], k.shape[1], k.shape[2], k.shape[2], lead=112), []
    for negate in (False, True):
        bias = torch.full((sequences.all_rows,), torch.nan, device=device)
        shifts = {"k_shift": k_shift.to(device), "q_shift": q_shift.to(device), "negate": negate, "rotate": rotate}
        quantizers.quantize_rows(k.to(device), sequences, is_k=True, mask=mask.to(device), key_bias=bias, **shifts)
        bias = bias.view(*k.shape[:2], -1).cpu()
        assert not bias[..., :112].any() and not bias[..., 132:].any()
        found.append(bias[..., 112:132])
    return found


@pytest.mark.parametrize("device", DEVICES)
def test_queries_take_a_sign_and_keep_their_order(device):
    x = spread(2, 2, 50, 32)
    negated = on(device, quantize_on_device, -1, x, is_k=False, order=0, negate=True)
    assert_same_bits(negated, quantize_eagerly(-1, -x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("order", [0, 32, 64])
def test_a_lead_moves_the_slots_and_an_order_permutes_them(order, axis, device):
    x = spread(2, 2, 50, 32)
    assert_same_bits(on(device, quantize_on_device, axis, x, lead=112, order=order), quantize_eagerly(axis, x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_tokens_are_zeros_and_groups_start_at_the_first_allowed_one(dtype, device):
    x = spread(3, 2, 50, 32, dtype=dtype)
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[1, :21] = False
    mask[:, 30:33] = False
    mask[2, 40:] = False
    first = [0, 21, 0]
    zeroed = torch.where(mask[:, None, :, None], x, 0.0)
    x = torch.where(mask[:, None, :, None], x, torch.nan)
    for axis in (-1, -2):
        codes, scales, values = on(device, quantize_on_device, axis, x, mask=mask)
        for row, start in enumerate(first):
            expected = quantize_eagerly(axis, zeroed[row, :, start:])
            slots, groups = expected[0].shape[1], expected[1].shape[1]
            assert_same_bits([codes[row, :, :slots], scales[row, :, :groups], values[row, :, : 50 - start]], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    "transform", [lambda x: x.transpose(1, 2), lambda x: x.mT, lambda x: x[..., ::2, :], lambda x: x[:, :1].expand(-1, 3, -1, -1)]
)
def test_strides_do_not_matter(transform, axis, device):
    x = transform(spread(2, 32, 16, 32, dtype=torch.bfloat16))
    assert_same_bits(on(device, quantize_on_device, axis, x), quantize_eagerly(axis, x.contiguous()))


@pytest.mark.gpu
def test_addresses_beyond_32_bits():
    """2^31 elements and more: the last rows are quantized like a copy of them."""
    from qat_kernels.triton import operands
    from support.kernels import quantizers

    x = torch.empty(2, 40, 215040, 128, dtype=torch.bfloat16, device="cuda").normal_()
    assert x.numel() > 2**31
    sequences = operands.Sequences(2, 40, 215040, 215040)
    tail = x[-1, -1, -4096:]
    queries = quantizers.quantize_rows(x, sequences, is_k=False)
    assert torch.equal(queries[-4096:], nvfp4.scaled_codes(tail).to(x.dtype))
    del queries
    values = quantizers.quantize_tokens(x, sequences)
    assert torch.equal(values[-4096:], nvfp4.scaled_codes(tail, axis=-2).to(x.dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reciprocals(dtype, axis, device):
    """The rule of servers: scales of zero among them, and ties that move."""
    x = spread(2, 2, 45, 48, dtype=dtype)
    x[0, 0, :20, :20] = 2.0**-14
    actual = on(device, quantize_on_device, axis, x, reciprocal=True)
    assert (actual[1] == 0).any()
    assert_same_bits(actual, quantize_eagerly(axis, x, scale="reciprocal"))


def fake_quantize_on_device(k, v, key_mask, *, device):
    from qat_kernels.triton import operands

    formats = QuantSpec(preset="kv_nvfp4").formats
    # A mask that is a part of a longer one, as a cache passes it.
    mask = None if key_mask is None else torch.cat((key_mask, ~key_mask), 1).to(device)[:, : key_mask.shape[1]]
    return [x.cpu() for x in operands.fake_quantize_kv(k.to(device), v.to(device), mask, formats)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_of_servers_in_one_launch(dtype, masked, device):
    k, v = spread(3, 2, 37, 48, dtype=dtype), spread(3, 37, 2, 48, dtype=dtype, seed=1).transpose(1, 2)
    k[1, 1, 5, 3], v[0, 0, 1] = torch.nan, 0
    mask = torch.rand(3, 37, generator=torch.Generator().manual_seed(2)) < 0.7 if masked else None
    actual = on(device, fake_quantize_on_device, k, v, mask)
    if mask is not None:
        k, v = (torch.where(mask[:, None, :, None], x, 0.0) for x in (k, v))
    assert_same_bits(
        actual, [nvfp4.in_format(x, how) for x, how in zip((k, v), QuantSpec(preset="kv_nvfp4").formats[1:3], strict=True)]
    )
    assert all(x.is_contiguous() and x.dtype == dtype for x in actual)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_and_values_of_packed_documents(device):
    k, v = spread(41, 3, 32), spread(41, 3, 32, seed=1)
    formats = QuantSpec(preset="kv_nvfp4").formats
    actual = on(device, fake_quantize_on_device, k, v, None)
    assert_same_bits(actual, [nvfp4.in_format(k, formats.key), nvfp4.in_format(v, formats.value)])


def masks_by_slot(mask: torch.Tensor, lead: int, *, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    from qat_kernels.triton.operands import Sequences, allowed_keys

    batch, length = mask.shape
    allowed, leftpad = allowed_keys(mask.to(device), Sequences(batch, 2, length, length, lead=lead))
    return allowed.cpu(), leftpad.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [0, 112])
@pytest.mark.parametrize("length", [1, 17, 128, 1025])
def test_key_masks_by_slot_begin_with_the_first_allowed_key(length, lead, device):
    """With holes, padding of any length, no key at all, and of any strides."""
    generator = torch.Generator().manual_seed(length)
    mask = torch.rand(4, length, generator=generator) > 0.4
    mask[1, : length - 1], mask[2] = False, False
    for given in (mask, mask.t().contiguous().t(), mask[:1].expand(3, -1)):
        allowed, leftpad = on(device, masks_by_slot, given, lead)
        assert (leftpad.dtype, allowed.dtype, allowed.shape[1] % 128) == (torch.int32, torch.uint8, 0)
        for row, first, by_slot in zip(given, leftpad, allowed, strict=True):
            assert first == (int(row.nonzero()[0]) if row.any() else 0)
            expected = torch.zeros(len(by_slot), dtype=torch.uint8)
            expected[lead : lead + length - first] = row[first:]
            assert torch.equal(by_slot, expected)
