"""Baselines of the experiments: the definition as one of them, and each against float64 formulas written here."""

import dataclasses
import math

import pytest
import torch

from scripts.evidence.attention.baseline_attention import baseline_attention
from scripts.evidence.attention.baselines import BASELINES, Baseline
from scripts.evidence.attention.dense import SMOOTHING_BLOCK
from support.kernels import oracle
from support.kernels.cases import Case, error, plain_attention, random_cases, run

PLAIN = Baseline(quantize_qk=False, quantize_p=False, quantize_v=False)


def run_baseline(baseline: Baseline, q, k, v, grad_out, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = baseline_attention(*leaves, baseline=baseline, **options)
    return out.detach(), torch.autograd.grad(out, leaves, grad_out)


def options_of(case: Case) -> dict:
    return {"causal": case.causal, "scale": case.scale, "key_mask": case.key_mask()}


def formula(baseline: Baseline, q, k, v, grad_out, *, causal=False, scale=None, key_mask=None):
    """O, dQ, dK, dV of one baseline, head by head and dense, from its docstrings and docs/NUMERICS.md, section 5."""
    out, dq, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for b in range(q.shape[0]):
        valid = torch.ones(k.shape[2], dtype=torch.bool) if key_mask is None else key_mask[b]
        first = int(valid.nonzero()[0]) if valid.any() else k.shape[2]
        for h in range(q.shape[1]):
            n = h // (q.shape[1] // k.shape[1])
            own = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2] - first if causal else None
            parts = one_head(
                baseline, q[b, h], k[b, n, first:], v[b, n, first:], grad_out[b, h], valid[first:], own, scale
            )  # fmt: skip
            out[b, h], dq[b, h] = parts[:2]
            dk[b, n, first:] += parts[2]
            dv[b, n, first:] += parts[3]
    return out, (dq, dk, dv)


def one_head(baseline, q, k, v, do, valid, own, scale):
    k, v = (torch.where(valid[:, None], x, 0.0) for x in (k, v))
    j = torch.arange(k.shape[0])
    allowed, kept = valid.expand(q.shape[0], -1), torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    if own is not None:
        allowed = allowed & (j <= own[:, None])
        if baseline.kept_groups:
            kept = (j < 16) | (j // 16 == own[:, None] // 16)
    # Smoothing as matrices: subtracting a mean is x - A x.
    average_q, average_k = torch.zeros(len(q), len(q)).double(), torch.zeros(len(k), len(k)).double()
    if baseline.smooth_q:
        for start in range(0, len(q), SMOOTHING_BLOCK):
            size = min(SMOOTHING_BLOCK, len(q) - start)
            average_q[start : start + size, start : start + size] = 1 / size
    if baseline.smooth_k:
        average_k = valid.double().expand(len(k), -1) / max(1, int(valid.sum()))
    mean_q, k = average_q @ q, k - average_k @ k
    qf, kf = (phi(baseline, x, -1) if baseline.quantize_qk else x for x in (q - mean_q, k))
    vf = phi(baseline, v, 0 if baseline.value_axis == "tokens" else 1) if baseline.quantize_v else v

    s = ((qf @ kf.T + mean_q @ k.T) * scale * math.log2(math.e)).masked_fill(~allowed, -math.inf)
    top = torch.cat([s.masked_fill(kept, -math.inf), torch.full((len(s), 1), -1e6).double()], 1).amax(1, keepdim=True)
    m = top.ceil() if baseline.integer_max else top
    weights = torch.exp2(s - m.clamp(min=-1000))
    norm = weights.sum(1, keepdim=True)
    norm = torch.where(norm == 0, 1.0, norm)
    p = weights / norm
    g = baseline.p_global_scale
    pf = phi(baseline, weights.masked_fill(kept, 0.0).float() * g, 1) / g / norm if baseline.quantize_p else p
    pf = torch.where(kept, 0.0, pf)
    pk = torch.where(kept, p, 0.0)
    out, twin = pf @ vf + pk @ v, (p - pk) @ vf + pk @ v

    x = {"forward": pf + pk, "unquantized": p}.get(baseline.value_gradient)
    if x is None:
        x = torch.where(kept, p, phi(dataclasses.replace(baseline, scale_floor=False), p, 1))
    dp = torch.where(kept, do @ v.T, do @ vf.T)
    ds = p * (dp - (do * (twin if baseline.delta == "twin" else out)).sum(1, keepdim=True)) * scale
    dqs, dks = ds @ kf, ds.T @ qf + ds.T @ mean_q
    dq = dqs - average_q.T @ dqs + average_q.T @ (ds @ k)
    return out, dq, dks - average_k.T @ dks, x.T @ do


def phi(baseline: Baseline, x, axis):
    """The oracle's; without the floor, groups whose scale rounds to zero are zero."""
    xf = oracle.phi(x, axis)[0]
    if baseline.scale_floor:
        return xf
    x = x.float().movedim(axis, -1)
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % 16)).unflatten(-1, (-1, 16))
    scale = (padded.abs().amax(-1, keepdim=True) / 6).to(torch.float8_e4m3fn).float()
    nonzero = (scale > 0).expand_as(padded).flatten(-2)[..., : x.shape[-1]].movedim(-1, axis)
    return torch.where(nonzero, xf, 0.0)


@pytest.mark.parametrize("case", random_cases(48), ids=str)
def test_the_definition_is_a_baseline(case):
    quantized = {} if case.preset == "nvfp4" else {"quantize_p": False, "quantize_v": False}
    baseline = Baseline(rotate=case.rotate, four_over_six=case.four_over_six, **quantized)
    tensors = case.tensors()
    out, _, grads = run(*tensors, **case.options())
    actual, actual_grads = run_baseline(baseline, *tensors, **options_of(case), k_shift=case.k_shift())
    assert error(actual, out) < (1e-10 if case.size <= 1e2 else 1e-8)
    floors = [*oracle.uncancelled(*tensors, **case.oracle_options()), 0.0]  # where softmax saturates, gradients are roundoff
    for grad, expected, floor in zip(actual_grads, grads, floors, strict=True):
        # The gradient of the rotation, which the definition does in float32, is in float32 here.
        assert error(grad, expected, floor) < (1e-6 if case.rotate else 1e-8)


CASES = (
    Case(lq=150, lk=150, head_dim=32, heads=(2, 2), batch=1),
    Case(lq=300, lk=300, head_dim=16, heads=(4, 2), causal=True, batch=1),  # two chunks, three smoothing blocks
    Case(lq=90, lk=90, heads=(2, 1), causal=True, mask="left"),
    Case(lq=17, lk=150, heads=(3, 1), mask="holes", size=3.0),
    Case(lq=33, lk=48, heads=(2, 2), causal=True, size=0.02),
    Case(lq=40, lk=33, heads=(2, 2), causal=True, mask="empty row"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_equals_its_formula(name, case):
    tensors = case.tensors()
    out, grads = run_baseline(BASELINES[name], *tensors, **options_of(case))
    expected, expected_grads = formula(BASELINES[name], *tensors, **options_of(case))
    assert error(out, expected) < 1e-10
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert error(grad, wanted) < 1e-10


@pytest.mark.parametrize("name", [n for n in BASELINES if n != "definition"])
def test_every_baseline_is_something_else(name):
    """Each changes the output or a gradient of the definition by far more than rounding."""
    case = Case(lq=300, lk=300, head_dim=32, causal=True, batch=1, size=1.5)
    tensors = case.tensors()
    tensors[1] += 3.0  # a mean to be smoothed
    ours, theirs = (run_baseline(b, *tensors, causal=True) for b in (Baseline(), BASELINES[name]))
    assert max(error(a, b) for a, b in zip((theirs[0], *theirs[1]), (ours[0], *ours[1]), strict=True)) > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("smoothing", [{}, {"smooth_k": True}, {"smooth_q": True}, {"smooth_q": True, "smooth_k": True}], ids=str)
def test_without_quantization_it_is_plain_attention(smoothing, causal):
    """SageAttention3's smoothing changes no score beyond a constant of the row, and its gradient is that of attention."""
    case = Case(lq=150, lk=150, causal=causal, mask="left")
    tensors = case.tensors()
    allowed = case.key_mask()[:, None, None].expand(-1, 1, 150, -1)
    allowed = allowed.tril() if causal else allowed
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    expected = plain_attention(*leaves, allowed, 32**-0.5)[0]
    means = {"q_means": torch.ones(case.heads[0], 2, case.head_dim), "k_shift": torch.ones(case.heads[1], case.head_dim)}
    calibrated, _ = run_baseline(PLAIN, *tensors, **options_of(case), **means)
    assert error(calibrated, expected) < 1e-12
    out, grads = run_baseline(dataclasses.replace(PLAIN, **smoothing), *tensors, **options_of(case))
    assert error(out, expected) < 1e-12
    for grad, wanted in zip(grads, torch.autograd.grad(expected, leaves, tensors[3]), strict=True):
        assert error(grad, wanted) < 1e-12


def test_smoothing_helps_where_keys_and_queries_have_means():
    q, k, v, grad_out = Case(lq=256, lk=256, head_dim=64, heads=(2, 2)).tensors(torch.float32)
    q, k = q + 2 * torch.randn(1, 2, 1, 64), k + 4 * torch.randn(1, 2, 1, 64)
    exact = run_baseline(PLAIN, q, k, v, grad_out)[0]
    errors = {
        flags: error(run_baseline(Baseline(smooth_q=flags[0], smooth_k=flags[1]), q, k, v, grad_out)[0], exact)
        for flags in ((False, False), (False, True), (True, True))
    }
    assert errors[True, True] < 0.8 * errors[False, True] < 0.8 * 0.8 * errors[False, False]


def test_the_public_backward_loses_dv_with_length():
    """docs/NUMERICS.md, section 5: dV keeps 97 % of its norm at 256 tokens, and 66 % at 1,024."""
    for length, share in ((256, 0.97), (1024, 0.66)):
        tensors = Case(lq=length, lk=length, head_dim=128, heads=(2, 2), batch=1, seed=1).tensors(torch.float32)
        public, forward = (
            run_baseline(dataclasses.replace(BASELINES["public_training"], value_gradient=which), *tensors)[1][2].norm()
            for which in ("normalized", "forward")
        )
        assert abs(public / forward - share) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(dtype):
    """Arithmetic is float32 inside, autocast or not; the output and the gradients have the dtype of the inputs."""
    case = Case(lq=90, lk=90, causal=True)
    tensors = case.tensors(dtype)
    out, grads = run_baseline(BASELINES["sage3"], *tensors, causal=True)
    wide, _ = run_baseline(BASELINES["sage3"], *(x.float() for x in tensors), causal=True)
    assert torch.equal(out, wide.to(dtype))
    assert all(grad.dtype == dtype and grad.isfinite().all() for grad in grads)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, again_grads = run_baseline(BASELINES["sage3"], *transposed, causal=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(again, out) < tolerance
    assert max(error(a, b) for a, b in zip(again_grads, grads, strict=True)) < tolerance


def test_chunks_change_nothing(monkeypatch):
    case = Case(lq=300, lk=300, heads=(4, 2), batch=1)
    tensors = case.tensors()
    whole = run_baseline(BASELINES["sage3"], *tensors)
    monkeypatch.setattr("scripts.evidence.attention.dense.SCORES_PER_CHUNK", 1)
    for part, expected in zip(run_baseline(BASELINES["sage3"], *tensors)[1], whole[1], strict=True):
        assert error(part, expected) < 1e-12


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_axis": "rows"}, r"value_axis: expected one of tokens, head_dim, got 'rows'"),
        ({"delta": "O"}, r"delta: expected one of twin, out"),
        ({"value_gradient": None}, r"value_gradient: expected one of forward, unquantized, normalized"),
        ({"p_global_scale": 0.0}, r"p_global_scale: expected a positive number"),
        ({"quantize_p": False, "delta": "out"}, r"delta: has no effect with quantize_p=False"),
    ],
)
def test_bad_baselines_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Baseline(**fields)


def test_bad_tensors_are_refused():
    q = torch.zeros(1, 2, 8, 16)
    with pytest.raises(ValueError, match="shape of k"):
        baseline_attention(q, q[..., :8], q[..., :8], baseline=Baseline())
