"""The inference kernel's emulation against the eager forward: the option grid, under Triton's interpreter or on a GPU."""

from functools import partial
from unittest import mock

import pytest
import torch

from qat_kernels import attention, unpack
from support.kernels import oracle
from support.kernels.cases import Case, assert_same_bits, error, lse_error
from support.kernels.interpreter import on
from support.kernels.packed_cases import SPECS as PACKED_SPECS
from support.kernels.packed_cases import problem as packed_problem
from support.kernels.triton_runs import CASES, DEVICES, DOCUMENTS, Q_SHIFTED, run_reference


def call(tensors, options: dict, *, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, on the CPU."""
    q, k, v = (x.to(device) for x in tensors[:3])
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return tuple(x.cpu() for x in attention(q, k, v, **options, return_lse=True, impl="fp4"))


def run_inference(case: Case, tensors, *, device: str):
    """Twice output and log-sum-exp."""
    return [call(tensors, case.options(), device=device) for _ in range(2)]


FP4_CASES = [case for case in [*CASES, *Q_SHIFTED] if "fp4" in case.spec().rules.impls and case.head_dim_v is None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", FP4_CASES, ids=str)
def test_within_the_bounds_of_the_forward_and_bit_equal_twice(case, device):
    tensors = case.tensors(torch.bfloat16)
    (out, lse), again = on(device, run_inference, case, tensors)
    assert_same_bits(again, (out, lse))
    expected, _, expected_lse, _ = run_reference(case, tensors)
    assert out.dtype == torch.bfloat16
    assert error(out, expected) < 3e-3
    assert lse_error(lse, expected_lse) < 1e-4


def run_packed(*, device: str, **options) -> tuple[tuple, list[tuple], tuple]:
    """Documents packed, each alone, and packed in eager float32."""
    _, alone, together, keywords, packing = packed_problem(torch.bfloat16, DOCUMENTS, **options)
    separate = [call(tensors, keywords, device=device) for tensors in alone]
    expected = attention(*(x.float() for x in together[:3]), **keywords, **packing, return_lse=True, impl="eager")
    return call(together, keywords | packing, device=device), separate, expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [*PACKED_SPECS[1:3], PACKED_SPECS[3] | {"q_shifted": True}], ids=str)
def test_packed_documents_are_as_if_alone_to_the_bit(options, device):
    (out, lse), alone, (expected, expected_lse) = on(device, run_packed, **options)
    assert error(out, expected) < 3e-3
    assert lse_error(lse, expected_lse) < 1e-4
    start = 0
    for (out_alone, lse_alone), (queries, _) in zip(alone, DOCUMENTS, strict=True):
        document = slice(start, start + queries)
        assert_same_bits((out[document].transpose(0, 1)[None], lse[:, document][None]), (out_alone, lse_alone))
        start += queries
    assert start == len(out)


def run_both(case: Case, tensors, *, device: str) -> list[tuple]:
    """The inference kernel with the tile of the training forward, and that forward."""
    from qat_kernels.fp4 import launch as fp4_launch
    from qat_kernels.triton import tiles

    tile = tiles.choose(80, case.head_dim, case.causal).forward
    with mock.patch.object(fp4_launch, "choose", lambda *_: fp4_launch.Tile(*tile, min(tile.block_n, 64))):
        mine = call(tensors, case.options(), device=device)
    return [mine, attention(*tensors[:3], **case.options(), return_lse=True, impl="triton")]


@pytest.mark.parametrize(
    "options", [{}, {"mask": "holes", "shift": True, "q_shifted": True}, {"head_dim": 128, "size": 3.0}], ids=str
)
def test_equals_the_training_forward_to_the_bit(options):
    """Tile by tile it computes the same: the same codes of P~, ties and all. (Kept groups are summed in other tiles.)"""
    case = Case(lq=40, lk=150, batch=1, heads=(2, 1), **options)
    mine, training = on("cpu", run_both, case, case.tensors(torch.bfloat16))
    assert_same_bits(mine, training)


THRESHOLDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def probabilities_with_ties() -> torch.Tensor:
    """P~ [16, 2048]: each group has a largest value, and values at the ties of the scale that this leads to, and just above."""
    largest = torch.logspace(-16, 0, 16 * 128, base=2).view(16, 128, 1)
    scale = (largest * 448).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)
    ties = (THRESHOLDS * scale).double() / 2688
    neighbours = torch.cat([ties.float(), torch.nextafter(ties.float(), torch.tensor(1.0))], 2)
    return torch.cat([largest, torch.minimum(neighbours, largest), largest / 3], 2).view(16, 2048)


def run_pack(x: torch.Tensor, order: int, *, device: str) -> tuple[torch.Tensor, ...]:
    from support.kernels.quantized_p import quantize_probabilities

    return quantize_probabilities(x, order=order, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", [0, 32, 64])
def test_packed_weights_are_those_of_the_training_forward_to_the_bit(order, device):
    x = probabilities_with_ties()
    groups = x.view(16, 128, 16)
    scale = (groups.amax(2) * 448).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)
    scaled = groups * (torch.full_like(scale, 2688) / scale)[:, :, None]  # a number over a tensor would be a reciprocal's product
    assert torch.isin(scaled, THRESHOLDS).sum() > 5000  # exact ties, as the kernels see them
    if order:  # columns of the tile are permuted
        place, threads = torch.arange(2048) % order, 64 // order
        j, t, b = place // 8, place // 2 % 4, place % 2
        slots = torch.arange(2048) - place + t // threads * 16 + t % threads * (16 // threads) + 2 * j + b
        x = x[:, slots]
    values, codes, scales = on(device, run_pack, x, order)
    codes = oracle.E2M1[unpack(codes, 2048).int()].float().view(16, 128, 16)
    decoded = codes * scales.view(torch.float8_e4m3fn).float()[:, :, None]
    assert torch.equal(decoded.view(16, 2048), values)
    assert torch.equal(codes, rounded(scaled))
    # Half an ulp decides ties: with a quotient that is rounded twice some codes differ.
    assert not torch.equal(codes, rounded(groups * (scale.reciprocal() * 2688)[:, :, None]))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """The nearest values of E2M1, ties to even codes."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    above, at = (x[..., None] > THRESHOLDS).sum(-1), torch.isin(x, THRESHOLDS)
    return values[above + (at & (above % 2 == 1))]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "mask": "left", "q_shifted": True}, {"preset": "nvfp4_qk"}],
    ids=str,
)
def test_products_with_scales_agree_with_their_emulation(options):
    """`tl.dot_scaled` itself, which Triton takes apart where there are no FP4 units; from 3.8 on it can do so on sm_90."""
    from qat_kernels.fp4 import launch as fp4_launch

    if torch.cuda.get_device_capability() < (10, 0) and fp4_launch.TRITON < (3, 8):
        pytest.skip(f"Triton {fp4_launch.TRITON} compiles tl.dot_scaled for GPUs with FP4 units only; 3.8 for this one too")
    case = Case(lq=700, lk=700, head_dim=128, heads=(4, 2), **options)
    tensors = case.tensors(torch.bfloat16)
    (emulated, emulated_lse), _ = run_inference(case, tensors, device="cuda")
    products, forward = [], fp4_launch.forward

    def launched(kernel):
        products.append(kernel.asm["ttir"].count("tt.dot_scaled"))

    with (
        mock.patch.object(fp4_launch, "why_not_native", lambda arch, head_dim, quantize_pv: None),
        mock.patch.object(fp4_launch, "forward", partial(forward, launched=launched)),
    ):
        (out, lse), again = run_inference(case, tensors, device="cuda")
    # It ran twice, and each of its loops multiplied so, P by V too if these are quantized.
    assert len(products) == 2 and min(products) >= (1 if case.preset == "nvfp4_qk" else 2)
    assert_same_bits(again, (out, lse))
    assert error(out, emulated) < 3e-3
    assert lse_error(lse, emulated_lse) < 1e-4
