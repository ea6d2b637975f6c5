"""From check to model on a real GPU: what the check finds there, and FP4 attention on the inputs of real models.

On a GPU without FP4 units the kernel is emulated: right, and slower than the training forward, so `auto` takes that. With a
Triton whose `tl.dot_scaled` runs there too, the kernel for FP4 units itself goes the whole way, though not on FP4 units.
"""

import functools
import sys
from unittest import mock

import pytest
import torch

from qat_kernels import attention
from qat_kernels.fp4 import launch as fp4_launch
from qat_kernels.ran import counted
from qat_patch import AttnQATConfig, patch_model
from qat_patch.self_check import child, store
from qat_patch.self_check.check import known_verdicts
from support.kernels.interpreter import interpreted
from support.models.lively_wan import tiny_wan_pipeline
from support.models.tiny_qwen3 import tiny_qwen3, token_ids

BOUND = 3e-3
DOT_SCALED = (3, 8)
"""The Triton from which on `tl.dot_scaled` runs on GPUs without FP4 units, in BF16."""


def generate_text(model, device):
    with torch.no_grad():
        model(token_ids().to(device), use_cache=False)


def generate_video(pipe, device):
    pipe.set_progress_bar_config(disable=True)
    pipe("a red square", height=64, width=64, num_frames=5, num_inference_steps=1, output_type="latent")


MODELS = {
    "qwen3": (tiny_qwen3, generate_text),
    "wan": (tiny_wan_pipeline, generate_video),
}


def recorded_calls(name, device, dtype):
    """Of every attention call that a tiny model makes: how far fp4 is from the training forward."""
    make, run = MODELS[name]
    model = make().to(device, dtype)
    handle = patch_model(model)
    return len(handle.patched), errors_of_calls(handle, functools.partial(run, model, device))


def errors_of_calls(handle, run):
    """Of every attention call of a patched model."""
    calls, errors = [], []
    with handle.observed(lambda layer, call: calls.append((layer, call))), torch.no_grad():
        run()
    for layer, call in calls:
        options = {"spec": layer.spec, "causal": call.causal, "scale": call.scale, "key_mask": call.key_mask}
        fp4, triton = (attention(call.query, call.key, call.value, **options, impl=impl).float() for impl in ("fp4", "triton"))
        errors.append(((fp4 - triton).norm() / triton.norm()).item())
    return errors


def watch_launches(monkeypatch):
    """How many `tl.dot_scaled` each launch of the kernel has from now on."""
    found, forward = [], fp4_launch.forward

    def launched(kernel):
        found.append(kernel.asm["ttir"].count("tt.dot_scaled"))

    monkeypatch.setattr(fp4_launch, "forward", functools.partial(forward, launched=launched))
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_every_call_of_a_model_is_within_the_bounds(name, monkeypatch):
    products = watch_launches(monkeypatch)
    modules, errors = recorded_calls(name, "cuda", torch.bfloat16)
    assert len(errors) >= modules and max(errors) < BOUND
    if torch.cuda.get_device_capability()[0] < 10:
        assert len(products) == len(errors) and not any(products)  # emulated


WITHOUT_SPEED = """
import functools
import sys
from qat_kernels.fp4 import launch, machine_code
from qat_kernels.self_check import __main__, timing

launch.why_not_native = lambda *_: None
machine_code.why_not_on_fp4_units = lambda *_: None
timing.GAIN = 0.0
timing.measure = functools.partial(timing.measure, lengths=(1, 256))
__main__.main(sys.argv[1:])
"""
"""The program of the self-check, but that every GPU passes for one with FP4 units, and the kernel for faster."""


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_way_through_dot_scaled_without_the_speed_criterion(name, tmp_path, monkeypatch, capsys):
    """The kernel for FP4 units is checked in a child, `auto` takes it, and each call of the model is right."""
    if fp4_launch.TRITON < DOT_SCALED:
        pytest.skip("this Triton has no dot_scaled for this GPU")
    monkeypatch.setenv(store.FOLDER, str(tmp_path))
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-c", WITHOUT_SPEED))
    monkeypatch.setattr(fp4_launch, "why_not_native", lambda *_: None)
    make, run = MODELS[name]
    model = make().to("cuda", torch.bfloat16)
    handle = patch_model(model)
    report = handle.check()
    with capsys.disabled():
        print(f"\n{report}\n{handle}")
    assert all(each.result["state"] == "passed" and each.result["error"] < BOUND and each.is_kept for each in report.checked)
    products = watch_launches(monkeypatch)
    with counted() as counts, torch.no_grad():
        run(model, "cuda")
    assert counts == {"fp4": len(products)} and min(products) >= 2  # Q K^T and P V
    errors = errors_of_calls(handle, functools.partial(run, model, "cuda"))
    with capsys.disabled():
        print(f"{name}: {len(errors)} calls, relative L2 up to {max(errors):.1e}")
    assert len(errors) == counts["fp4"] and max(errors) < BOUND


def first_calls(name):
    """On the CPU, a layer's worth: what the test above does."""
    make = {"qwen3": lambda: tiny_qwen3(num_hidden_layers=1)}[name]
    with mock.patch.dict(MODELS, {name: (make, lambda model, device: model(token_ids(1, 20), use_cache=False))}):
        return recorded_calls(name, "cpu", torch.bfloat16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real one runs there")
def test_every_call_under_the_interpreter():
    modules, errors = interpreted(first_calls, "qwen3")
    assert len(errors) == modules == 1 and errors[0] < BOUND


@pytest.mark.gpu
def test_the_check_of_a_model_and_what_follows_from_it(tmp_path, monkeypatch, capsys):
    """Minutes: 75,600 tokens, and more elements than 32 bits can count."""
    monkeypatch.setenv(store.FOLDER, str(tmp_path))
    model = tiny_qwen3(torch.bfloat16, head_dim=128, num_hidden_layers=1).to("cuda")
    handle = patch_model(model, AttnQATConfig())
    report = handle.check()
    (checked,) = report.checked
    with capsys.disabled():
        print(f"\n{report}\n{checked.result['errors']}\n{handle}")
    assert checked.result["state"] == "passed" and checked.is_kept
    assert len(checked.result["errors"]) == 10 and checked.result["error"] < BOUND
    (verdict,) = [each for each in known_verdicts().found if each.device == torch.device("cuda:0")]
    emulated = checked.result["emulated"] is not None
    if emulated:
        assert checked.result["wins_from"] is verdict.wins_from is None and "emulated in BF16" in str(handle)
    with counted() as counts, torch.no_grad():
        model(token_ids(1, 2048).cuda(), use_cache=False)
    expected = "fp4" if verdict.wins_from is not None and max(verdict.wins_from) <= 2048 else "triton"
    assert counts == {expected: 1}
    assert verdict.taken in str(handle)


@pytest.mark.gpu
def test_doctor_and_generate_tell_the_same(tmp_path, monkeypatch, capsys):
    from qat_patch import export_checkpoint
    from qat_patch.commands import generate
    from support.models.tiny_wan import tiny_tokenizer

    monkeypatch.setenv(store.FOLDER, str(tmp_path / "cache"))
    model = tiny_qwen3(torch.bfloat16)
    patch_model(model)
    export_checkpoint(model, tmp_path / "out", tokenizer=tiny_tokenizer())
    generate.main([str(tmp_path / "out"), "--prompt", "a red square", "--max-new-tokens=4", "--min-new-tokens=4"])
    out = capsys.readouterr().out
    prefill = "fp4" if "fp4 from" in out and ", 1 fp4" in out else "triton"
    assert f"calls of 4-bit attention: 3 {prefill}, 9 decode; 4 tokens in" in out
    assert ("self-check of FP4 units, once" in out) == (torch.cuda.get_device_capability()[0] >= 10)
