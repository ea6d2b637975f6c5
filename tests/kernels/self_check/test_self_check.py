"""The self-check itself: what it finds in kernels with every kind of fault, in a kernel without, and how it tells who wins."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from qat_kernels import QuantSpec
from qat_kernels.fp4 import launch, machine_code
from qat_kernels.self_check import check, guarded, problems, subjects, timing
from qat_kernels.triton import launch as training
from qat_kernels.verdicts import Case
from qat_patch.self_check import child
from support.kernels.fake_gpu import as_training, definition
from support.kernels.interpreter import interpreted

CPU = torch.device("cpu")
SPEC = QuantSpec().to_json()
CASES = [Case(32, causal, SPEC, torch.bfloat16) for causal in (False, True)]
OF_FP4, OTHER = "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale a;", "mma.sync.aligned.m16n8k16.row.col.f32 a;"


def kernel_with(products, other=0):
    """A compiled kernel with this many products of FP4 units in its loop; Triton shows its PTX."""
    lines = ["$L__BB0_1:", "mov.u32 %r1, 0;", "$L__BB0_2:", *[OF_FP4] * products, *[OTHER] * other, "@%p1 bra $L__BB0_2;"]
    return SimpleNamespace(asm={"ptx": "\n".join(["bra.uni $L__BB0_1;", *lines, "@%p2 bra $L__BB0_1;", "ret;"])})


GOOD_KERNEL = kernel_with(64)


def stub(change=lambda out, lse, calls: None, kernel=GOOD_KERNEL):
    """A launcher whose kernel computes the definition into the memory that it is given; `change` may spoil it."""
    calls = []

    def forward(*args, allocate=launch.new_outputs, launched=None, **options):
        out, lse = allocate(args[0], args[5])
        if isinstance(kernel, Exception):
            raise kernel
        for mine, right in zip((out, lse), definition(*args, **options), strict=True):
            mine.copy_(right)
        calls.append(args)
        change(out, lse, calls)
        if launched is not None:
            launched(kernel)
        return out, lse

    return forward


def decide(monkeypatch, forward, *, case=CASES[0], ratios=(2.0,) * 4, arch=80, names=None):
    """The result of the check of a launcher on small problems, and whether the process can continue."""
    monkeypatch.setattr(launch, "forward", forward)
    monkeypatch.setattr(training, "forward", lambda *args, **o: SimpleNamespace(out=(r := as_training(*args, **o))[0], lse=r[2]))
    every, sizes = problems.problems, [(a, b) for a in (16, 64) for b in (16, 64)]

    def small(case, device, tensors):
        made = every(case, device, tensors=tensors, long=90, largest=(2, 2, 48, case.head_dim))
        return (each for each in made if names is None or each.name in names)

    monkeypatch.setattr(problems, "problems", small)
    timed = [timing.Timed(*size, 1.0, ratio, 3.0) for size, ratio in zip(sizes, ratios, strict=True)]
    monkeypatch.setattr(timing, "measure", lambda forward, case, device: timed)
    monkeypatch.setattr(subjects, "arch_of", lambda device: arch)
    monkeypatch.setattr(launch, "TRITON", (3, 9))
    return check.decided(case, CPU)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_right_kernel_passes_on_every_problem(monkeypatch, case):
    names = []
    every = problems.problems
    monkeypatch.setattr(problems, "problems", lambda *a, **o: (names.append(each.name) or each for each in every(*a, **o)))
    result, is_well = decide(monkeypatch, stub(), case=case)
    assert (result["state"], result["wins_from"], is_well) == ("passed", (16, 16), True)
    assert result["error"] < 1e-2 and "sm_80" in result["emulated"] and len(result["times"]) == 4
    assert names == [
        "gaussian", "peaky", "odd lengths", "one query", "more queries than keys", "masked", "packed", "shifted keys",
        "shifted queries", "long", "over 2^31 elements",
    ]  # fmt: skip
    assert list(result["errors"]) == names


def scaled(out, lse, calls):
    out.mul_(1.0625)


def one_row(out, lse, calls):
    if out.ndim == 4:
        out[-1, -1, -1] = 0


def shifted_lse(out, lse, calls):
    lse.add_(3e-4)


def nan_left(out, lse, calls):
    out[..., 0, :] = torch.nan


def nan_in_lse(out, lse, calls):
    lse[..., -1] = torch.nan


def before(out, lse, calls):
    whole = out.as_strided((1,), (1,), out.storage_offset() - 1)
    whole.fill_(0)


def behind(out, lse, calls):
    lse.as_strided((1,), (1,), lse.storage_offset() + lse.numel()).fill_(0)


def another_time(out, lse, calls):
    if len(calls) % 2 == 0:
        out[0, 0, 0, 0] += 1e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scaled, "wrong: O is off by 6.2e-02, expected less than 0.003 (gaussian)"),
        (one_row, "wrong: O is off by"),
        (shifted_lse, "wrong: the log-sum-exp is off by 3.0e-04, expected less than 0.0001 (gaussian)"),
        (nan_left, "wrong: it left or computed NaN in O (gaussian)"),
        (nan_in_lse, "wrong: it left or computed NaN in the log-sum-exp (gaussian)"),
        (before, "wrong: it wrote beside O (gaussian)"),
        (behind, "wrong: it wrote beside the log-sum-exp (gaussian)"),
        (another_time, "wrong: other bits the second time (gaussian)"),
    ],
)
def test_a_wrong_kernel_fails_with_the_reason(monkeypatch, change, words):
    result, is_well = decide(monkeypatch, stub(change))
    assert result["state"] == "failed" and words in result["reason"] and is_well


@pytest.mark.parametrize("name", ["long", "over 2^31 elements", "packed", "masked"])
def test_every_problem_can_fail(monkeypatch, name):
    result, _ = decide(monkeypatch, stub(scaled), names={name}, case=CASES[1])
    assert result["state"] == "failed" and f"({name})" in result["reason"]


def test_a_kernel_that_does_not_shift_queries_fails(monkeypatch):
    forward = stub()
    result, _ = decide(monkeypatch, lambda *args, q_shift=None, **options: forward(*args, **options), names={"shifted queries"})
    assert result["state"] == "failed" and "(shifted queries)" in result["reason"]


def test_outputs_that_are_never_written_are_noticed():
    q = torch.randn(1, 20, 2, 32).transpose(1, 2)
    memory = guarded.Guarded()
    out, lse = memory(q, None)
    assert out.shape == q.shape and out.stride() == q.stride() and lse.shape == (1, 2, 20)
    assert memory.problem() == "it left or computed NaN in O"
    out.zero_()
    assert memory.problem() == "it left or computed NaN in the log-sum-exp"
    lse.fill_(-torch.inf)
    assert memory.problem() is None


@pytest.mark.parametrize(
    ("error", "state", "words"),
    [
        (RuntimeError("PassManager::run failed"), "failed", "it stopped with RuntimeError: PassManager::run failed"),
        (torch.OutOfMemoryError("tried to allocate 4 GiB"), "none", "out of memory: tried to"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "none", "out of memory: Triton Error"),
        (MemoryError(), "none", "out of memory: MemoryError"),
    ],
)
def test_what_stops_a_kernel(monkeypatch, error, state, words):
    result, is_well = decide(monkeypatch, stub(kernel=error))
    assert result["state"] == state and words in result["reason"] and not is_well


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((2.0, 2.0, 2.0, 2.0), (16, 16)),
        ((0.5, 0.5, 0.5, 2.0), (64, 64)),
        ((0.5, 0.5, 2.0, 2.0), (64, 16)),
        ((0.5, 2.0, 0.5, 2.0), (16, 64)),
        ((2.0, 2.0, 2.0, 0.5), None),  # what wins when it is small need not be larger
        ((0.5, 2.0, 2.0, 2.0), (16, 64)),
        ((1.04,) * 4, None),  # by 5 % at least
        ((0.9,) * 4, None),
    ],
)
def test_what_wins_from_which_size_on(monkeypatch, ratios, expected):
    result, _ = decide(monkeypatch, stub(), ratios=ratios, names={"one query"})
    assert result["wins_from"] == expected


@pytest.mark.parametrize(
    ("arch", "head_dim", "preset", "needed"),
    [(120, 128, "nvfp4", 64), (120, 64, "nvfp4", 32), (120, 96, "nvfp4_qk", 8), (100, 128, "nvfp4", 4), (103, 64, "nvfp4", 3)],
)
def test_machine_code_without_fp4_units_fails(monkeypatch, arch, head_dim, preset, needed):
    """As Triton 3.8 compiles head dim 64 for sm_100: it multiplies, and not on FP4 units."""
    case = Case(head_dim, False, QuantSpec(preset=preset).to_json(), torch.bfloat16)
    for products, state in ((needed, "passed"), (needed - 1, "failed"), (0, "failed")):
        with monkeypatch.context() as patch:
            kernel = kernel_with(products, other=8)
            result, _ = decide(patch, stub(kernel=kernel), case=case, arch=arch, names={"one query"})
        assert result["state"] == state
        if state == "failed":
            words = f"not on FP4 units: its main loop has {products} products of FP4 units where a tile needs {needed}"
            assert words in result["reason"]


def test_products_are_counted_in_the_innermost_loop():
    ptx = f"{OF_FP4}\n" + kernel_with(3).asm["ptx"] + f"\n{OF_FP4}"
    assert machine_code.products_in_loop(ptx) == 3
    twice = ptx.replace("@%p1 bra", "@%p3 bra $L__BB0_2;\n" + f"{OF_FP4}\n" + "@%p1 bra")  # two jumps back, one loop
    assert machine_code.products_in_loop(twice) == 4
    assert machine_code.products_in_loop("ret;") == 0


def run_kernels(names):
    """The real kernels, under the interpreter."""
    every, found = problems.problems, []

    def small(case, device, tensors):
        made = every(case, device, tensors=tensors, long=35, largest=(1, 2, 16, case.head_dim))
        return (each for each in made if each.name in names)

    measure = timing.measure
    with (
        mock.patch.object(problems, "problems", small),
        mock.patch.object(timing, "measure", lambda *args: measure(*args, lengths=(16,))),
        mock.patch.object(timing, "_HEADS", 1),
        mock.patch.object(timing, "_ROUNDS", 1),
    ):
        found += [check.decided(case, CPU) for case in CASES]
    return found


def test_the_kernels_pass_as_they_are():
    for result, is_well in interpreted(run_kernels, {"long", "over 2^31 elements"}):
        assert (result["state"], is_well) == ("passed", True) and result["error"] < 3e-3
        assert result["times"][0]["kernel"] > 0


@pytest.mark.slow
def test_the_kernels_pass_on_small_problems_of_every_kind():
    names = {"more queries than keys", "masked", "shifted keys", "shifted queries", "packed"}
    assert [result["state"] for result, _ in interpreted(run_kernels, names)] == ["passed"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_program_without_a_gpu_has_no_verdict():
    cases = [case.to_dict() for case in CASES]
    results = list(child.results("cuda:0", cases))
    assert [each["case"] for each in results] == cases
    assert all(each["state"] == "none" and "no context on cuda:0" in each["reason"] for each in results)


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128, 256])
def test_the_largest_problem_is_beyond_32_bits_and_not_larger_than_it_must(head_dim):
    assert 2**31 < torch.Size(problems.large(head_dim)).numel() < 1.04 * 2**31
