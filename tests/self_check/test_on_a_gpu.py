"""The whole way on a real GPU: what a check finds there, and FP4 attention on what models really pass.

On a GPU without FP4 units the kernel is emulated: right, and slower than the training forward, so `auto` takes that.
"""

from unittest import mock

import pytest
import torch

from qat_kernels import attention
from qat_kernels.fp4 import launch as fp4_launch
from qat_kernels.ran import counted
from qat_patch import AttnQATConfig, patch_model
from qat_patch.self_check import store
from qat_patch.self_check.check import known_verdicts
from support.kernels.interpreter import interpreted
from support.models.lively_wan import tiny_wan_pipeline
from support.models.tiny_qwen3 import tiny_qwen3, token_ids

BOUND = 3e-3
DOT_SCALED = (3, 9)
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
    model, calls = make().to(device, dtype), []
    handle = patch_model(model)
    with handle.observed(lambda layer, call: calls.append((layer, call))), torch.no_grad():
        run(model, device)
    errors = []
    for layer, call in calls:
        options = {"spec": layer.spec, "causal": call.causal, "scale": call.scale, "key_mask": call.key_mask}
        fp4, triton = (attention(call.query, call.key, call.value, **options, impl=impl).float() for impl in ("fp4", "triton"))
        errors.append(((fp4 - triton).norm() / triton.norm()).item())
    return len(handle.patched), errors


@pytest.mark.gpu
@pytest.mark.parametrize("native", [False, True], ids=["emulated", "dot_scaled"])
@pytest.mark.parametrize("name", MODELS)
def test_every_call_of_a_model_is_within_the_bounds(name, native, monkeypatch):
    if native:
        if fp4_launch.TRITON < DOT_SCALED:
            pytest.skip("this Triton has no dot_scaled for this GPU")
        monkeypatch.setattr(fp4_launch, "why_not_native", lambda *_: None)
    modules, errors = recorded_calls(name, "cuda", torch.bfloat16)
    assert len(errors) >= modules and max(errors) < BOUND


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
        print(f"\n{report}\n{checked.result}\n{handle}")
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
