"""The Triton attention against the eager one in float32: docs/NUMERICS.md, sections 3 to 7.

On a CPU Triton's interpreter runs small, odd shapes; on a GPU the same tests run natively, and those of
test_triton_attention_gpu.py at the sizes of real models.
"""

from unittest import mock

import pytest
import torch

from support.kernels.cases import SPECS, Case, assert_same_bits, error, lse_error
from support.kernels.interpreter import on
from support.kernels.triton_runs import CASES, DEVICES, DTYPES, Q_SHIFTED, SMALL, assert_within_bounds, run_kernels, run_reference

ALL = [*CASES, *Q_SHIFTED]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(len(ALL)), ids=[str(case) for case in ALL])
def test_results_stay_within_the_bounds(index, device):
    """Dtypes take turns under the interpreter."""
    case = ALL[index]
    for dtype in DTYPES if device == "cuda" else [DTYPES[index % 3], torch.float32][: 1 + (index % 3 != 2)]:
        tensors = case.tensors(dtype)
        actual = on(device, run_kernels, case, tensors)
        if case.lk == 1:  # dQ and dK are zeros: softmax over one key is constant
            assert all(x.abs().max() < 1e-2 for x in actual[3][:2])
            actual = (*actual[:3], actual[3][2:])
            expected = run_reference(case, tensors)
            assert_within_bounds(actual, (*expected[:3], expected[3][2:]), dtype, device)
        else:
            assert_within_bounds(actual, run_reference(case, tensors), dtype, device)


def run_poisoned(case: Case, tensors: list[torch.Tensor], *, device: str) -> tuple:
    """`run_kernels` twice: as it is, and with every new buffer full of NaN."""

    def poisoned(new):
        def call(*args, **kwargs):
            x = new(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else 99)

        return call

    plain = run_kernels(case, tensors, device=device)
    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        return plain, run_kernels(case, tensors, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [*SPECS, {"q_shifted": True, "causal": True, "mask": "left"}], ids=str)
def test_twice_the_same_bits_whatever_new_memory_holds(options, device):
    case = Case(**{**SMALL, **options, "lk": 45})
    plain, again = on(device, run_poisoned, case, case.tensors(torch.bfloat16))
    assert_same_bits(again, plain)


def run_with_a_shift_of_zero(case: Case, tensors: list[torch.Tensor], *, device: str) -> tuple[tuple, tuple]:
    """With one, and without."""
    plain = run_kernels(case, tensors, device=device)
    with mock.patch.object(Case, "q_shift", lambda case: torch.zeros(case.heads[1], case.head_dim)):
        return run_kernels(case, tensors, device=device), plain


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "mask": "left", "shift": True}], ids=str)
def test_a_shift_of_queries_of_zero_changes_no_bit(options, device):
    case = Case(**{**SMALL, **options})
    shifted, plain = on(device, run_with_a_shift_of_zero, case, case.tensors(torch.bfloat16))
    assert_same_bits(shifted, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask", [None, "left"])
def test_future_tokens_leave_earlier_outputs_bit_identical(mask, device):
    case = Case(**{**SMALL, "lq": 50, "lk": 50, "causal": True, "mask": mask})
    tensors = case.tensors(torch.bfloat16)
    before = on(device, run_kernels, case, tensors)
    for position in (1, 15, 16, 33, 49):
        changed = [x.clone() for x in tensors]
        for x in changed[:3]:
            x[:, :, position:] = x[:, :, position:].flip(2) * 20 + 1
        after = on(device, run_kernels, case, changed)
        for a, b in zip(after[:3], before[:3], strict=True):
            assert torch.equal(a[:, :, :position], b[:, :, :position])
            assert not torch.equal(a[:, :, position:], b[:, :, position:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "q_shifted": True}, {"causal": True, "preset": "nvfp4_qk"}], ids=str)
@pytest.mark.parametrize("mask", ["holes", "left"])
def test_what_masked_slots_hold_has_no_effect(mask, options, device):
    case = Case(**{**SMALL, **options, "mask": mask})
    q, k, v, grad_out = case.tensors(torch.bfloat16)
    excluded = ~case.key_mask()[:, None, :, None].expand(k.shape)
    zeroed = on(device, run_kernels, case, [q, k.masked_fill(excluded, 0.0), v.masked_fill(excluded, 0.0), grad_out])
    for grad in zeroed[3][1:]:
        assert not grad[excluded].any()
    result = on(device, run_kernels, case, [q, k.masked_fill(excluded, torch.nan), v.masked_fill(excluded, torch.inf), grad_out])
    assert_same_bits(result, zeroed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{"causal": True, "mask": "holes"}, {"preset": "nvfp4_qk"}], ids=str)
def test_strides_do_not_show_in_the_bits(options, device):
    case = Case(**{**SMALL, **options})
    tensors = case.tensors(torch.bfloat16)
    expected = on(device, run_kernels, case, tensors)
    fused = torch.full((1, 2, 37, 3 * case.head_dim), torch.nan, dtype=torch.bfloat16)
    for strided in (
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors],
        [x.mT.contiguous().mT for x in tensors],
        [torch.cat((fused[:, : x.shape[1], :, :32], x), -1)[..., 32:] for x in tensors],
    ):
        result = on(device, run_kernels, case, strided)
        assert_same_bits(result, expected)
        assert result[0].stride() == torch.empty_like(strided[0]).stride()
        assert all(x.is_contiguous() for x in result[3])
    broadcast = torch.ones((), dtype=torch.bfloat16).expand(tensors[0].shape)
    actual = on(device, run_kernels, case, [*tensors[:3], broadcast])
    assert_same_bits(actual, on(device, run_kernels, case, [*tensors[:3], broadcast.contiguous()]))


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_that_serves_as_operand_gives_the_bits_of_its_copy(device):
    """Kept groups read dO as it is: with nothing to pad and contiguous, the given tensor itself."""
    case = Case(**{**SMALL, "causal": True, "lq": 128, "head_dim": 16, "heads": (1, 1)})
    *qkv, grad_out = case.tensors(torch.bfloat16)
    assert grad_out.is_contiguous()
    expected = on(device, run_kernels, case, [*qkv, grad_out.mT.contiguous().mT])
    assert_same_bits(on(device, run_kernels, case, [*qkv, grad_out]), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
def test_rows_without_keys_are_zero(preset, device):
    """A sequence with no key at all; and causal rows before the first key, by left padding or because Lq > Lk."""
    case = Case(**{**SMALL, "lq": 40, "lk": 33, "causal": True, "preset": preset, "batch": 3})
    mask = torch.ones(3, 33, dtype=torch.bool)
    mask[1], mask[2, :9] = False, False
    empty = torch.zeros(3, 40, dtype=torch.bool)
    empty[:, :7], empty[1], empty[2, : 7 + 9] = True, True, True
    out, out_hp, lse, (dq, dk, dv) = on(device, run_kernels, case, case.tensors(torch.bfloat16), key_mask=mask)
    empty = empty[:, None].expand(lse.shape)
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert not out_hp[empty].any()
    assert out[~empty].any(-1).all()
    assert not dq[empty].any()
    assert not dk[1].any()
    assert not dv[1].any()
    assert all(x.isfinite().all() for x in (out, out_hp, dq, dk, dv))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_dimensions(causal, device):
    for batch, lq, lk in ((2, 5, 0), (2, 0, 5), (0, 5, 5), (0, 0, 0)):
        case = Case(batch=batch, lq=lq, lk=lk, causal=causal, mask="left", shift=True)
        out, out_hp, lse, grads = on(device, run_kernels, case, case.tensors(torch.bfloat16))
        assert lse.shape == (batch, 4, lq)
        assert (lse == -torch.inf).all()
        assert [x.shape for x in (out, *grads)] == [(batch, 4, lq, 32), (batch, 4, lq, 32), *[(batch, 2, lk, 32)] * 2]
        assert not any(x.any() for x in (out, out_hp, *grads))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_not_finite_inputs_stay_visible(causal, bad, device):
    """In q the row, in k and v the rows that see the token; nothing else, but for v that earlier rows of a tile skip as 0 * v."""
    case = Case(**{**SMALL, "lq": 50, "lk": 50, "causal": causal})
    tensors = case.tensors(torch.bfloat16)
    clean = on(device, run_kernels, case, tensors)[0]
    for index, head in ((0, 1), (1, 0), (2, 0)):
        broken = [x.clone() for x in tensors]
        broken[index][0, head, 20, 7] = bad
        out = on(device, run_kernels, case, broken)[0]
        affected = torch.zeros(out.shape[:3], dtype=torch.bool)
        if index == 0:
            affected[0, 1, 20] = True
        else:
            affected[0, :, 20 if causal else 0 :] = True
        assert (~out.isfinite()).any(-1)[affected].all()
        if not (causal and index == 2):
            assert torch.equal(out[~affected], clean[~affected])


def run_with_tiles(case: Case, tensors: list[torch.Tensor], sizes: list[tuple[int, int]], *, device: str) -> list[tuple]:
    from qat_kernels.triton import backward_launch, forward_launch, tiles

    results = []
    for block_m, block_n in sizes:
        for launch in (forward_launch, backward_launch):
            launch._plan.cache_clear()  # plans are kept by shape
        tile = tiles.Tile(block_m=block_m, block_n=block_n, num_warps=4, num_stages=1)
        apart = tiles.Apart(key=tile, value=tile) if block_n == 128 else tile
        chosen = tiles.Tiles(forward=tile, grad_query=tile, grad_key_value=apart)
        with mock.patch.object(tiles, "choose", lambda *_, chosen=chosen: chosen):
            results.append(run_kernels(case, tensors, device=device))
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "q_shifted": True}, {"causal": True, "mask": "holes", "shift": True}], ids=str
)
def test_tiles_change_nothing_beyond_rounding(options, device):
    """Neither what is quantized nor what is kept depends on them: codes that differed would show as 1e-2."""
    case = Case(**{**SMALL, **options, "lq": 83, "lk": 90})
    first, *others = on(device, run_with_tiles, case, case.tensors(torch.float32), [(32, 64), (16, 128), (64, 32)])
    bound = 1e-2 if device == "cuda" else 1e-5
    for other in others:
        for a, b in zip((*other[:2], *other[3]), (*first[:2], *first[3]), strict=True):
            assert error(a, b) < bound
        assert lse_error(other[2], first[2]) < 1e-6
