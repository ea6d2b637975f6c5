"""The eager attention, forward and whole: docs/NUMERICS.md, sections 3, 4, 6 and 7, against the oracle and plain softmax."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qat_kernels import QuantSpec, attention, reference
from qat_kernels.mask import Mask
from support.kernels import oracle
from support.kernels.cases import (
    SPECS,
    UNEQUAL_HEAD_DIMS,
    Case,
    assert_same_bits,
    error,
    exact_problem,
    forward_op,
    lse_error,
    plain_attention,
    random_cases,
    run,
    run_case,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("case", [*random_cases(64), *UNEQUAL_HEAD_DIMS], ids=str)
def test_forward_equals_the_oracle(case):
    q, k, v, _ = case.tensors()
    tolerance = 1e-10 if case.size <= 1e2 else 1e-8
    expected = oracle.attention(q, k, v, **case.oracle_options())
    out, lse = attention(q, k, v, return_lse=True, **case.options())
    assert out.dtype == lse.dtype == torch.float64
    assert error(out, expected["out"]) < tolerance
    assert lse_error(lse, expected["lse"]) < tolerance
    out_of_op, out_hp, lse_of_op = forward_op(case, q, k, v)
    assert_same_bits((out_of_op, lse_of_op), (out, lse))
    assert out_hp.numel() == 0 if case.preset == "nvfp4_qk" else error(out_hp, expected["out_hp"]) < tolerance


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", [{"rotate": True}, {"four_over_six": True}, {"rotate": True, "four_over_six": True}], ids=str)
def test_sums_that_round_differently_flip_few_codes(options, causal):
    case = Case(lq=90, lk=90, head_dim=64, causal=causal, shift=True, mask="holes", seed=3, **options)
    q, k, v, _ = case.tensors()
    expected = oracle.attention(q, k, v, **case.oracle_options())
    out, lse = attention(q, k, v, return_lse=True, **case.options())
    assert error(out, expected["out"]) < 3e-2
    assert lse_error(lse, expected["lse"]) < 3e-2
    other = oracle.attention(q, k, v, **case.oracle_options() | dict.fromkeys(options, False))
    assert error(out, other["out"]) > 3e-2


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("mask", [None, "holes", "left"])
@pytest.mark.parametrize("causal", [False, True])
def test_exact_inputs_give_plain_attention(causal, mask, shift):
    """Without any rounding but P's, LSE is torch.logsumexp of the true scores, and O' (and O with BF16 PV) is plain attention."""
    case, (q, k, v), allowed = exact_problem(causal, mask, shift)
    expected, logsumexp = plain_attention(q, k, v, allowed, case.scale)
    out, lse = attention(q, k, v, return_lse=True, **case.options())
    assert lse_error(lse, logsumexp) < 1e-12
    assert error(forward_op(case, q, k, v)[1], expected) < 1e-12
    assert 1e-3 < error(out, expected) < 0.2
    out, lse = attention(q, k, v, return_lse=True, **case.options() | {"spec": QuantSpec(preset="nvfp4_qk")})
    assert lse_error(lse, logsumexp) < 1e-12
    assert error(out, expected) < 1e-12


BOUNDS = {torch.float32: (1e-4, 1e-4), torch.float16: (1e-3, 1e-3), torch.bfloat16: (3e-3, 1e-2)}


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("peaky", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_precision_stays_within_the_bounds(dtype, peaky, options):
    case = Case(lq=130, lk=130, head_dim=64, batch=1, coarse=True, seed=5, **options)
    q, k, v, grad_out = case.tensors(dtype)
    q = q * peaky
    out, lse, grads = run(q, k, v, grad_out, **case.options())
    expected = oracle.attention(q, k, v, **case.oracle_options())
    bound, bound_of_gradients = BOUNDS[dtype]
    assert {x.dtype for x in (out, *grads)} == {dtype}
    assert lse.dtype == torch.float32
    assert error(out, expected["out"]) < bound
    assert lse_error(lse, expected["lse"]) < 1e-5
    for actual, wanted in zip(grads, oracle.backward(q, k, v, grad_out, **case.oracle_options()), strict=True):
        assert error(actual, wanted) < bound_of_gradients


@pytest.mark.parametrize("mask", [None, "holes", "left"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_future_tokens_leave_earlier_outputs_bit_identical(dtype, mask):
    case = Case(lq=70, lk=70, causal=True, mask=mask, seed=1)
    q, k, v, _ = case.tensors(dtype)
    before = attention(q, k, v, return_lse=True, **case.options())
    for position in (1, 5, 15, 16, 17, 31, 40, 63, 64, 69):
        changed = [x.clone() for x in (q, k, v)]
        for x, other in zip(changed, Case(lq=70, lk=70, size=20.0, seed=position).tensors(dtype)[:3], strict=True):
            x[:, :, position:] = other[:, :, position:]
        after = attention(*changed, return_lse=True, **case.options())
        for a, b in zip(after, before, strict=True):
            assert torch.equal(a[:, :, :position], b[:, :, :position])
            assert not torch.equal(a[:, :, position:], b[:, :, position:])


@pytest.mark.parametrize("mask", [None, "left"])
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
def test_training_prefill_and_decoding_agree(preset, mask):
    case = Case(lq=53, lk=53, causal=True, preset=preset, mask=mask, seed=2)
    q, k, v, _ = case.tensors()
    options = case.options()
    key_mask = options.pop("key_mask")
    full = attention(q, k, v, key_mask=key_mask, return_lse=True, **options)
    steps = [(0, 21), (21, 40)] + [(t, t + 1) for t in range(53)]
    for start, stop in steps:
        step_mask = None if key_mask is None else key_mask[:, :stop]
        out, lse = attention(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], key_mask=step_mask, return_lse=True, **options)
        assert error(out, full[0][:, :, start:stop]) < 1e-12
        assert lse_error(lse, full[1][:, :, start:stop]) < 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "shift": True, "preset": "nvfp4_qk"}, {"rotate": True}], ids=str
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_padding_changes_nothing_beyond_rounding(dtype, tolerance, options, side):
    """A padded batch of sequences of lengths 50, 37 and 34 equals each of them alone; gradients of padding are zero."""
    case = Case(lq=50, lk=50, batch=3, coarse=True, seed=4, **options)
    tensors = case.tensors(dtype)
    lengths = (50, 37, 34)
    real = [slice(50 - n, 50) if side == "left" else slice(0, n) for n in lengths]
    mask = torch.zeros(3, 50, dtype=torch.bool)
    for row, part in enumerate(real):
        mask[row, part] = True
    *qkv, grad_out = tensors
    grad_out = torch.where(mask[:, None, :, None], grad_out, 0.0)  # losses ignore padding
    out, lse, grads = run(*qkv, grad_out, **case.options() | {"key_mask": mask})
    for row, part in enumerate(real):
        alone, lse_alone, grads_alone = run(*(x[row : row + 1, :, part] for x in (*qkv, grad_out)), **case.options())
        assert error(out[row : row + 1, :, part], alone) < tolerance
        assert lse_error(lse[row : row + 1, :, part], lse_alone) < tolerance
        for grad, grad_alone in zip(grads, grads_alone, strict=True):
            assert error(grad[row : row + 1, :, part], grad_alone) < tolerance
            assert not grad[row, :, ~mask[row]].any()


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("mask", ["holes", "left", "right", "empty row"])
def test_what_masked_slots_hold_has_no_effect(mask, dtype, options):
    case = Case(**{**options, "mask": mask, "seed": 6})
    q, k, v, grad_out = case.tensors(dtype)
    excluded = ~case.key_mask()[:, None, :, None].expand(k.shape)
    zeroed = run(q, k.masked_fill(excluded, 0.0), v.masked_fill(excluded, 0.0), grad_out, **case.options())
    for bad in (torch.nan, torch.inf, -torch.inf, 3e38 if dtype == torch.float32 else 1e4):
        result = run(q, k.masked_fill(excluded, bad), v.masked_fill(excluded, bad), grad_out, **case.options())
        assert_same_bits(result, zeroed)
    overflown = run(q, k, v, torch.full_like(grad_out, torch.nan), **case.options())
    for grad in (*zeroed[2][1:], *overflown[2][1:]):
        assert not grad[excluded].any()


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same [B, H, L, D] values in other memory."""
    batch, heads, length, head_dim = x.shape
    fused = torch.full((batch, length, heads, 3 * head_dim), torch.nan, dtype=x.dtype)
    fused[..., head_dim : 2 * head_dim] = x.transpose(1, 2)
    return {
        "transposed": x.transpose(1, 2).contiguous().transpose(1, 2),
        "slice of a fused projection": fused[..., head_dim : 2 * head_dim].transpose(1, 2),
        "head dim not innermost": x.mT.contiguous().mT,
    }


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strides_do_not_show_in_the_bits(dtype, options):
    case = Case(lq=50, lk=50, seed=7, **options)
    tensors = case.tensors(dtype)
    expected = run(*tensors, **case.options())
    for name in layouts(tensors[0]):
        strided = [layouts(x)[name] for x in tensors]
        result = run(*strided, **case.options())
        assert_same_bits(result, expected)
        assert result[0].stride() == torch.empty_like(strided[0]).stride(), name


def test_output_of_a_transposed_view_needs_no_copy():
    q, k, v, _ = (layouts(x)["transposed"] for x in Case().tensors())
    assert attention(q, k, v).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("options", SPECS, ids=str)
def test_twice_the_same_bits(options):
    case = Case(lq=90, lk=90, seed=8, **options)
    first = run_case(case, torch.float32)
    for _ in range(3):
        assert_same_bits(run_case(case, torch.float32), first)


@pytest.mark.parametrize("options", SPECS, ids=str)
@pytest.mark.parametrize(("scores", "causal_rows"), [(1, 128), (2777, 7), (1 << 24, 33)])
def test_chunks_change_nothing_beyond_rounding(monkeypatch, scores, causal_rows, options):
    case = Case(lq=60, lk=75, seed=9, coarse=True, **options)
    whole = run_case(case)
    monkeypatch.setattr(reference, "_SCORES_PER_CHUNK", scores)
    monkeypatch.setattr(reference, "_CAUSAL_ROWS", causal_rows)
    out, lse, grads = run_case(case)
    assert error(out, whole[0]) < 1e-12
    assert lse_error(lse, whole[1]) < 1e-12
    for grad, expected in zip(grads, whole[2], strict=True):
        assert error(grad, expected) < 1e-12


class PeakMemory(TorchDispatchMode):
    """Counts the elements of all storages that are alive after each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear_in_the_length(monkeypatch, causal):
    monkeypatch.setattr(reference, "_SCORES_PER_CHUNK", 1 << 14)
    peaks = []
    for length in (192, 768):
        q, k, v, grad_out = Case(lq=length, lk=length, head_dim=16, heads=(1, 1), batch=1).tensors(torch.float32)
        options = {"spec": QuantSpec(), "mask": Mask(causal=causal), "scale": 0.25}
        with PeakMemory() as memory:
            _, out_hp, _ = reference.forward(q, k, v, None, None, None, with_out_hp=True, **options)
            reference.backward(grad_out, q, k, v, out_hp, None, None, None, **options)
        peaks.append(memory.peak)
    assert peaks[1] > 8 * q.nbytes  # it does count: quantized copies, O, O' and gradients
    assert peaks[1] < 4 * peaks[0]  # four times the length


@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
def test_rows_without_keys_are_zero(preset):
    """A sequence with no key at all; and causal rows before the first key, by left padding or because Lq > Lk."""
    case = Case(lq=40, lk=33, causal=True, preset=preset, batch=3)
    mask = torch.ones(3, 33, dtype=torch.bool)
    mask[1], mask[2, :9] = False, False
    empty = torch.zeros(3, 40, dtype=torch.bool)
    empty[:, :7], empty[1], empty[2, : 7 + 9] = True, True, True
    out, lse, (dq, dk, dv) = run(*case.tensors(), **case.options() | {"key_mask": mask})
    empty = empty[:, None].expand(lse.shape)
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert out[~empty].any(-1).all()
    assert not dq[empty].any()
    assert not dk[1].any()
    assert not dv[1].any()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("options", [{}, {"mask": "holes"}, {"preset": "nvfp4_qk"}, {"shift": True, "rotate": True}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("batch", "lq", "lk"), [(2, 5, 0), (2, 0, 5), (0, 5, 5), (2, 0, 0), (0, 0, 0)])
def test_empty_dimensions(batch, lq, lk, causal, options):
    case = Case(batch=batch, lq=lq, lk=lk, causal=causal, **options)
    out, lse, grads = run_case(case, torch.float32)
    assert out.shape == (batch, 4, lq, 32)
    assert lse.shape == (batch, 4, lq)
    assert not out.any()
    assert (lse == -torch.inf).all()
    assert [x.shape for x in grads] == [(batch, 4, lq, 32), (batch, 2, lk, 32), (batch, 2, lk, 32)]
    assert not any(x.any() for x in grads)


def test_the_kept_groups_use_unquantized_values():
    """With one causal key the output is its value, which NVFP4 does not hold."""
    q, k, v, _ = Case(lq=1, lk=1).tensors()
    assert error(attention(q, k, v, causal=True), v.repeat_interleave(2, 1)) < 1e-12
    assert error(attention(q, k, v), v.repeat_interleave(2, 1)) > 1e-2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("preset", ["nvfp4", "nvfp4_qk"])
def test_not_finite_inputs_stay_visible(preset, bad):
    """In q the row, in k and v the sequence and head; nothing else."""
    q, k, v, _ = Case(preset=preset).tensors(torch.float32)
    clean = attention(q, k, v, spec=QuantSpec(preset=preset))
    for x, affected in ((q, (0, 1, 5)), (k, (1, slice(0, 2))), (v, (1, slice(0, 2)))):
        index = (0, 1, 5, 7) if x is q else (1, 0, 20, 7)
        keep = x[index].clone()
        x[index] = bad
        out = attention(q, k, v, spec=QuantSpec(preset=preset))
        x[index] = keep
        assert (~out[affected].isfinite()).any(-1).all()
        untouched = torch.ones_like(out, dtype=torch.bool)
        untouched[affected] = False
        assert torch.equal(out[untouched], clean[untouched])


def test_defaults():
    """`attention` is not causal, scales by D ** -0.5 and quantizes everything, and returns the output alone."""
    q, k, v, _ = Case().tensors()
    explicit = attention(q, k, v, spec=QuantSpec(preset="nvfp4"), causal=False, scale=32**-0.5, impl="eager")
    assert torch.equal(attention(q, k, v), explicit)
