"""From patch_model to the FP4 units: what `auto` takes after which verdict, and that all reports agree."""

import contextlib
import copy
import json
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from qat_kernels import attention, explain
from qat_kernels.ran import counted
from qat_kernels.verdicts import Verdicts
from qat_patch import get_handle, patch_model, unpatch_model
from qat_patch.cli import main
from qat_patch.measure import doctor
from qat_patch.self_check import store
from qat_patch.self_check.check import NOT_CHECKED, known_verdicts
from support.kernels.fake_gpu import CPU, IDENTITY, fake_gpu, passed, says
from support.models.lively_wan import tiny_wan, tiny_wan_pipeline, wan_inputs
from support.models.tiny_qwen3 import tiny_qwen3


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of this test's own."""
    monkeypatch.setenv(store.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpu():
    with fake_gpu():
        yield


def ran(model, tokens=24, grad=False):
    """The implementations that a forward pass ran."""
    ids = torch.arange(2 * tokens).view(2, -1) % 50
    with counted() as counts, torch.set_grad_enabled(grad):
        model(ids, use_cache=False)
    return set(counts)


def explained(model, tokens=24):
    """What `explain` says runs."""
    (plan,) = get_handle(model).plans.values()
    layer, (case, *_) = plan.patched[0], plan.cases()
    q = torch.empty(2, 1, tokens, case.head_dim, dtype=case.dtype)
    words = explain(q, q, q, spec=layer.spec, causal=case.causal, impl=layer.impl, needs_gradient=False)
    return {line.partition(":")[0] for line in words.splitlines() if ": runs" in line}


@pytest.mark.usefixtures("gpu")
def test_without_a_verdict_triton_runs_and_the_receipt_says_so():
    model = tiny_qwen3()
    handle = patch_model(model)
    assert handle.impl == "auto" and NOT_CHECKED in str(handle).splitlines()[0]
    assert ran(model) == explained(model) == {"triton"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("result", "small", "large", "words"),
    [
        (passed((16, 16)), "fp4", "fp4", "impl auto: fp4 from 16 queries and 16 keys on, else triton"),
        (passed((32, 16)), "triton", "fp4", "impl auto: fp4 from 32 queries and 16 keys on, else triton"),
        (passed(None), "triton", "triton", "impl auto: triton (fp4 right, 0.50 times as fast as triton at 64 tokens: not"),
        (passed(None, emulated="sm_90 has no FP4 units"), "triton", "triton", "emulated in BF16 (sm_90 has no FP4 units)"),
        *(
            ({"state": "failed", "reason": reason, "identity": IDENTITY}, "triton", "triton", f"(fp4 failed: {reason})")
            for reason in ("wrong: O is off by 2.0e-01", "not on FP4 units: x", "it hung: killed after 300 s a case")
        ),
    ],
)
def test_auto_obeys_the_verdict_and_all_agree(monkeypatch, capsys, result, small, large, words):
    says(monkeypatch, result)
    model = tiny_qwen3()
    handle = patch_model(model)
    before = handle.config.to_json()
    report = handle.check()
    again = tiny_qwen3()
    patch_model(again)  # reads what was kept
    for each in (model, again):
        assert ran(each, 24) == explained(each, 24) == {small}
        assert ran(each, 48) == explained(each, 48) == {large}
        assert ran(each, 48, grad=True) == {"triton"}
        receipt = str(get_handle(each)).splitlines()[0]
        assert words in receipt and NOT_CHECKED not in receipt
    assert handle.config.to_json() == before  # no part of the numerics
    table = str(report)
    assert ("yes" if result["state"] == "passed" else "no") in table.split() and len(table.splitlines()) == 2
    (only,) = report.checked
    assert only.taken == ("triton" if result.get("wins_from") is None else words.partition("auto: ")[2])
    assert only.taken in table and only.words in table
    monkeypatch.setattr(doctor, "CASES", (only.case,))
    main(["doctor", "--check"])
    out = capsys.readouterr().out
    assert only.words in out and only.taken in out and NOT_CHECKED not in out


@pytest.mark.usefixtures("gpu")
def test_what_is_not_a_verdict_is_not_kept(monkeypatch, cache):
    says(monkeypatch, {"state": "none", "reason": "out of memory: tried to allocate 4 GiB"})
    model = tiny_qwen3()
    handle = patch_model(model)
    report = handle.check()
    assert "no verdict" in str(report) and "out of memory" in str(report) and not report.checked[0].is_kept
    assert not cache.exists() and ran(model) == {"triton"} and NOT_CHECKED in str(handle)


@pytest.mark.usefixtures("gpu")
def test_the_user_can_choose_the_implementation(monkeypatch):
    says(monkeypatch, passed((16, 16)))
    model = tiny_qwen3()
    patch_model(model).check()
    for impl in ("triton", "eager", "fp4"):
        unpatch_model(model)
        handle = patch_model(model, impl=impl)
        assert handle.impl == impl and f"impl {impl}" in str(handle) and ran(model) == explained(model) == {impl}
        handle.check()  # changes nothing about it
        assert ran(model) == {impl}
    with pytest.raises(ValueError, match="impl='fp4' has no gradient"):
        ran(model, grad=True)


def test_an_implementation_that_cannot_run_here_is_refused_before_anything_changes():
    model = tiny_qwen3()
    with pytest.raises(ValueError, match="impl='fp4' cannot run a Qwen3ForCausalLM here: .*got cpu.*one of 'auto', 'eager'"):
        patch_model(model, impl="fp4")
    with pytest.raises(ValueError, match="impl: expected one of auto, eager, sdpa, triton, fp4.*got 'flash'"):
        patch_model(model, impl="flash")
    assert get_handle(model) is None
    with pytest.raises(ValueError, match="expected an NVIDIA GPU, got a machine without one"):
        patch_model(model).check()


@pytest.mark.usefixtures("gpu")
def test_verdicts_hold_in_their_process_only(monkeypatch):
    says(monkeypatch, passed((16, 16)))
    model = tiny_qwen3()
    patch_model(model).check()
    assert ran(copy.deepcopy(model)) == {"fp4"}
    elsewhere = pickle.loads(pickle.dumps(model))
    assert all(layer.impl == "auto" for layer in get_handle(elsewhere).patched.values())
    assert ran(elsewhere) == {"triton"}


@pytest.mark.usefixtures("gpu")
def test_compiled_calls_choose_by_size_without_a_check(monkeypatch):
    says(monkeypatch, passed((32, 32)))
    model = tiny_qwen3()
    patch_model(model).check()
    (verdicts,) = {layer.impl for layer in get_handle(model).patched.values()}
    says(monkeypatch, None, "raise AssertionError")
    head_dim, dtype = verdicts.found[0].case.head_dim, verdicts.found[0].case.dtype
    compiled = torch.compile(
        lambda q: attention(q, q, q, causal=True, impl=verdicts), backend="eager", fullgraph=True, dynamic=True
    )
    for tokens, expected in ((24, "triton"), (32, "fp4"), (40, "fp4"), (31, "triton")):
        with counted() as counts, torch.no_grad():
            compiled(torch.randn(1, 2, tokens, head_dim, dtype=dtype))
        assert counts == {expected: 1}


@pytest.mark.usefixtures("gpu")
def test_packed_documents_count_by_their_mean_length(monkeypatch):
    says(monkeypatch, passed((32, 32)))
    handle = patch_model(tiny_qwen3())
    handle.check()
    (verdicts,) = {layer.impl for layer in handle.patched.values()}
    case = verdicts.found[0].case
    q = torch.randn(100, 2, case.head_dim, dtype=case.dtype)
    for lengths, expected in (((50, 50), "fp4"), ((97, 1, 1, 1), "triton")):
        bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        packing = {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": max(lengths) for x in "qk"}
        with counted() as counts:
            attention(q, q, q, causal=True, impl=verdicts, **packing)
        assert counts == {expected: 1}


def test_a_derivative_that_no_tensor_shows_takes_no_fp4(monkeypatch):
    says(monkeypatch, passed((16, 16)))
    with fake_gpu():
        handle = patch_model(tiny_qwen3())
        handle.check()
        (verdicts,) = {layer.impl for layer in handle.patched.values()}
    case = verdicts.found[0].case
    q = torch.randn(1, 2, 32, case.head_dim, dtype=case.dtype)
    gradient = torch.func.grad(lambda x: attention(x, q, q, causal=True, impl=verdicts).square().sum())(q)
    assert gradient.any()


def test_two_different_gpus_are_each_checked(monkeypatch, cache):
    code = """
for case in request["cases"]:
    n = len(os.listdir(os.environ["QAT_PATCH_CACHE"])) if os.path.isdir(os.environ["QAT_PATCH_CACHE"]) else 0
    identity = result["identity"] | {"gpu": ["Fake 5090", "Other"][n]}
    say(case, result | {"identity": identity, "wins_from": [[16, 16], None][n]})
"""
    says(monkeypatch, passed((16, 16)), code)
    others = [IDENTITY, IDENTITY | {"gpu": "Other"}]
    with fake_gpu(identities=others):
        handle = patch_model(tiny_qwen3())
        # The model is on the first of them.
        monkeypatch.setattr("qat_patch.handle.devices_of", lambda plan: [CPU, CPU])
        report = handle.check()
        assert [each.taken.partition(" ")[0] for each in report.checked] == ["fp4", "triton"]
        assert len(list(cache.glob("*.json"))) == 2
        found = known_verdicts().found
        assert [verdict.wins_from for verdict in found] == [(16, 16), None]
    with fake_gpu(identities=[IDENTITY | {"driver": "2"}]):
        assert known_verdicts() is None  # another driver: to be checked again


def test_generate_checks_once_and_says_what_ran(monkeypatch, tmp_path, capsys):
    from qat_patch import export_checkpoint
    from qat_patch.commands import generate
    from support.models.tiny_wan import tiny_tokenizer

    monkeypatch.setattr(generate, "_CHECKED", set())
    model = tiny_qwen3()
    patch_model(model)
    export_checkpoint(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    arguments = [str(tmp_path / "out"), "--prompt", "a red square", "--max-new-tokens=4", "--min-new-tokens=4"]
    with fake_gpu():
        says(monkeypatch, passed((1, 1)))
        generate.main(arguments)
        out = capsys.readouterr().out
        assert "self-check of FP4 units, once for this machine" in out
        assert "[calls of 4-bit attention: 3 fp4, 9 eager; 4 tokens in " in out and "tokens/s; peak memory" in out
        assert out.rstrip().endswith("[4-bit attention in 3 of 3 attention modules; fp4 and eager implementation, cpu]")
        says(monkeypatch, None, "raise AssertionError")
        generate.main(arguments)
        out = capsys.readouterr().out
        assert "self-check" not in out and "3 fp4, 9 eager" in out


@pytest.mark.parametrize("why", ["no verdict", "no folder"])
def test_generate_says_that_nothing_could_be_kept_and_checks_once_a_process(monkeypatch, tmp_path, capsys, cache, why):
    from qat_patch.commands import generate

    monkeypatch.setattr(generate, "_CHECKED", set())
    result = {"state": "none", "reason": "out of memory: tried to allocate 4 GiB"} if why == "no verdict" else passed()
    if why == "no folder":
        cache.write_text("a file where the folder should be")
    says(monkeypatch, result)
    with fake_gpu():
        handle = patch_model(tiny_qwen3())
        with pytest.warns(UserWarning, match="cannot be written") if why == "no folder" else contextlib.nullcontext():
            generate.checked(handle, "cpu")
        out = capsys.readouterr().out
        assert "once for this machine" in out and "some results could not be saved: there `auto` takes triton" in out
        assert "QAT_PATCH_CACHE" in out and NOT_CHECKED in str(handle)
        says(monkeypatch, None, "raise AssertionError")
        generate.checked(handle, "cpu")
        assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("gpu")
def test_doctor_reports_for_a_bug_report(monkeypatch, tmp_path, capsys):
    says(monkeypatch, passed((16, 16)))
    with pytest.raises(SystemExit):
        main(["doctor", "--chekc"])
    assert main(["doctor", "--report", str(tmp_path / "x.json")]) == 1
    assert "no effect without --check" in capsys.readouterr().err
    assert main(["doctor", "--check", "--report", str(tmp_path / "none" / "x.json")]) == 1
    main(["doctor"])
    assert NOT_CHECKED in capsys.readouterr().out
    assert main(["doctor", "--check", "--report", str(tmp_path / "x.json")]) == 0
    assert "checked here: right, 2.00 times as fast as triton" in capsys.readouterr().out
    written = json.loads((tmp_path / "x.json").read_text())
    assert len(written["checked"]) == 4 and written["checked"][0]["identity"] == IDENTITY and written["report"]


def test_doctor_says_that_there_is_nothing_to_check(capsys):
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith(f"{doctor.NO_GPU}\n")
    assert main(["doctor", "--check"]) == 1
    assert "expected an NVIDIA GPU, got a machine without one" in capsys.readouterr().err


def test_verdicts_are_auto_elsewhere():
    verdicts = Verdicts(())
    assert pickle.loads(pickle.dumps(verdicts)) == "auto"
    assert copy.copy(verdicts) is copy.deepcopy(verdicts) is verdicts


@pytest.mark.usefixtures("gpu")
def test_a_case_is_what_attention_computes_in():
    """Wan keeps some modules in float32: what counts is the type of attention."""
    model = tiny_wan().to(torch.bfloat16)
    model.scale_shift_table.data = model.scale_shift_table.data.float()
    (plan,) = patch_model(model).plans.values()
    assert [(case.head_dim, case.causal, case.dtype) for case in plan.cases()] == [(32, False, torch.bfloat16)]


@pytest.mark.usefixtures("gpu")
def test_what_both_transformers_of_a_pipeline_call_is_checked_once(monkeypatch):
    says(monkeypatch, passed((16, 16)))
    handle = patch_model(tiny_wan_pipeline(two_transformers=True))
    assert len(handle.plans) == 2 and len(handle.check().checked) == 1
    assert all(isinstance(layer.impl, Verdicts) for layer in handle.patched.values())


@pytest.mark.usefixtures("gpu")
def test_compiled_blocks_share_one_graph_with_verdicts_too(monkeypatch):
    says(monkeypatch, passed((16, 16)))
    model = tiny_wan()
    patch_model(model).check()
    says(monkeypatch, None, "raise AssertionError")  # no compilation starts a check
    counter = CompileCounter()
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    with counted() as counts, torch.no_grad():
        model(**wan_inputs(i2v=False))
    assert counts == {"fp4": 2 * len(model.blocks)} and counter.frame_count == 1


@pytest.mark.usefixtures("gpu")
def test_float64_is_for_eager_and_there_is_nothing_to_check():
    model = tiny_qwen3(torch.float64)
    with pytest.raises(ValueError, match="impl='fp4' cannot run a Qwen3ForCausalLM here: float64 is for eager only"):
        patch_model(model, impl="fp4")
    handle = patch_model(model)
    assert handle.unchecked(CPU) == []
    with pytest.raises(ValueError, match="float64 is for eager only; there is nothing to check"):
        handle.check()
