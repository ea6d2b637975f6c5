"""The self-check of SageAttention3, which no test here can run: of a stand-in that rounds as it does, and of faulty ones."""

import pytest
import torch

from qat_kernels import QuantSpec, attention, sageattn3
from qat_kernels.self_check import check, timing
from qat_kernels.self_check.subjects import SageAttention3
from qat_kernels.verdicts import Case
from support.kernels.fake_gpu import fake_gpu
from support.kernels.fake_sage import sageattn3_blackwell, small_check
from support.kernels.sage_server import SPEC, attend

CPU = torch.device("cpu")
CASES = [Case(*sizes, SPEC.to_json(), dtype) for sizes, dtype in (((64, False), torch.bfloat16), ((128, False), torch.float16))]


def decide(monkeypatch, kernel, case=CASES[0], names=("gaussian",), times=None):
    """The result of the check of a kernel, and whether the process can continue."""
    monkeypatch.setattr(sageattn3, "_loaded", lambda device, dtype: kernel)
    with fake_gpu(), small_check(names):
        if times is not None:
            monkeypatch.setattr(timing, "measure", lambda *_: times)
        return check.decided(case, CPU)


def spoiled(change):
    """A right kernel whose output, of its so-manieth call, is changed."""
    calls = []

    def kernel(q, k, v, **options):
        calls.append(q)
        out = sageattn3_blackwell(q, k, v, **options)
        return change(q, k, v, out, len(calls))

    return kernel


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_kernel_that_rounds_as_the_server_does_passes_on_every_problem(monkeypatch, case):
    result, is_well = decide(monkeypatch, sageattn3_blackwell, case, names=None)
    assert (result["state"], is_well, result["emulated"]) == ("passed", True, None)
    assert list(result["errors"]) == [
        "gaussian", "peaky", "odd lengths", "one query", "more queries than keys", "shifted queries and keys", "long",
        "over 2^31 elements",
    ]  # fmt: skip
    assert 0.02 < result["error"] < SageAttention3.bounds.output
    assert result["times"][0]["kernel"] > 0


def test_our_own_definition_passes_too(monkeypatch):
    def ours(q, k, v, **options):
        out = attention(q, k, v, spec=SPEC, impl="eager")
        k -= k.mean(-2, keepdim=True)
        return out

    result, _ = decide(monkeypatch, ours, names=None)
    assert result["state"] == "passed" and result["error"] == 0


def scaled(q, k, v, out, call):
    return out * 1.05


def one_row(q, k, v, out, call):
    out[-1, -1, -1] *= 1.2
    return out


def nan_left(q, k, v, out, call):
    return torch.cat([out[:, :, :-1], q.new_empty(out[:, :, -1:].shape)], dim=2)


def writes_into_q(q, k, v, out, call):
    q[0, 0, 0, 0] += 1
    return out


def writes_into_v(q, k, v, out, call):
    v[-1, -1, -1, -1] += 1
    return out


def another_time(q, k, v, out, call):
    out[0, 0, 0, 0] += 1e-2 * (call == 2)
    return out


def another_preset(preset):
    return lambda q, k, v, out, call: attention(q, k, v, spec=QuantSpec(preset=preset), impl="eager")


def without_smoothing_of_q(q, k, v, out, call):
    """The means of Q are subtracted and not brought back."""
    return attend(q - q.float().mean(-2, keepdim=True).to(q.dtype), k, v)


def other_v(q, k, v, out, call):
    """Groups of V that begin elsewhere."""
    return attend(q, k.roll(8, -2), v.roll(8, -2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scaled, "wrong: O is off by 6."),
        (one_row, "wrong: a row of O is off by 2."),
        (nan_left, "wrong: it left or computed NaN in O (gaussian)"),
        (writes_into_q, "wrong: it wrote into its inputs (gaussian)"),
        (writes_into_v, "wrong: it wrote into its inputs (gaussian)"),
        (another_time, "wrong: other bits the second time (gaussian)"),
        (another_preset("fastvideo_sm120"), "wrong: O is off by 1.7e-01"),
        (another_preset("nvfp4"), "wrong: O is off by 1.7e-01"),
        (without_smoothing_of_q, "wrong: O is off by"),
        (other_v, "wrong: O is off by"),
    ],
)
def test_a_wrong_kernel_fails_with_the_reason(monkeypatch, change, words):
    names = ("shifted queries and keys",) if change is without_smoothing_of_q else ("gaussian",)
    result, is_well = decide(monkeypatch, spoiled(change), names=names)
    assert result["state"] == "failed" and words in result["reason"] and is_well


@pytest.mark.parametrize("name", ["long", "over 2^31 elements", "one query", "more queries than keys", "odd lengths"])
def test_every_problem_can_fail(monkeypatch, name):
    result, _ = decide(monkeypatch, spoiled(lambda q, k, v, out, call: out * 1.1), names=(name,))
    assert result["state"] == "failed" and f"({name})" in result["reason"]


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (
            RuntimeError("only supports Blackwell GPUs or newer."),
            "failed",
            "it stopped with RuntimeError: only supports Blackwell",
        ),
        (torch.OutOfMemoryError("tried to allocate 4 GiB"), "none", "out of memory: tried to"),
    ],
)
def test_what_stops_a_kernel(monkeypatch, error, state, words):
    def stops(*_, **__):
        raise error

    result, is_well = decide(monkeypatch, stops)
    assert result["state"] == state and words in result["reason"] and not is_well


@pytest.mark.parametrize(("ratio", "expected"), [(1.06, (64, 64)), (1.04, None)])
def test_it_must_be_faster_than_the_training_forward(monkeypatch, ratio, expected):
    result, _ = decide(monkeypatch, sageattn3_blackwell, times=[timing.Timed(64, 64, 1.0, ratio, 3.0)])
    assert result["state"] == "passed" and result["wins_from"] == expected
