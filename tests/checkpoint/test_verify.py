"""python -m qat_patch verify: what it finds, in fresh processes and after damage that loading alone would not see."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qat_patch import AttnQATConfig, QuantSpec, export_checkpoint, patch_model, unpatch_model, verify_checkpoint
from qat_patch.cli import main
from support.models.exports import add_lora
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_wan import tiny_pipeline, tiny_transformer
from support.runs.runs import reseal


def edit_tensors(file, edit):
    """Change a safetensors file and keep its header."""
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata=metadata)


@pytest.fixture
def folder(tmp_path):
    model = tiny_qwen3(num_hidden_layers=2)
    patch_model(model, AttnQATConfig(exclude=["*.0.*"]))
    return export_checkpoint(model, tmp_path / "out")


def test_a_fresh_process_verifies_and_says_what_is_wrong(folder):
    command = [sys.executable, "-m", "qat_patch", "verify", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "verified"), done.stderr
    assert "model: 1 modules patched as exported, of them 0 with a K shift and 0 with a Q shift" in done.stdout
    for output in ("output", "original_output"):
        assert f"model: {output} bit-equal to what was recorded on cpu with torch {torch.__version__}" in done.stdout


def test_the_command_line_reports_failure(folder, capsys):
    (folder / "config.json").write_text("{}")
    assert main(["verify", str(folder)]) == 1
    assert "not verified: load_checkpoint:" in capsys.readouterr().err


def test_other_models_and_pipelines(tmp_path):
    pipe = tiny_pipeline(transformer_2=True)
    patch_model(pipe)
    report = verify_checkpoint(export_checkpoint(pipe, tmp_path / "pipe"))
    assert [line for line in report if "bit-equal" in line and line.startswith("transformer_2: output")]
    assert len([line for line in report if "bit-equal" in line]) == 4
    image = tiny_transformer(i2v=True)
    patch_model(image)
    assert len([line for line in verify_checkpoint(export_checkpoint(image, tmp_path / "i2v")) if "bit-equal" in line]) == 2


def test_your_own_inputs(tmp_path, monkeypatch):
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    ids = torch.arange(3, 25)[None]
    export_checkpoint(model, tmp_path / "own", example_inputs={"input_ids": ids})
    assert torch.equal(load_file(tmp_path / "own" / "qat_patch_reference.safetensors")["input.input_ids"], ids)
    assert len([line for line in verify_checkpoint(tmp_path / "own") if "bit-equal" in line]) == 2
    with pytest.raises(ValueError, match=r"example_inputs: expected tensors by argument name, got input_ids=\[3\]"):
        export_checkpoint(model, tmp_path / "bad", example_inputs={"input_ids": [3]})
    assert not (tmp_path / "bad").exists()
    monkeypatch.setattr("qat_patch.checkpoint.export.default_inputs", lambda model, host: None)
    export_checkpoint(model, tmp_path / "none")
    assert any("no reference output was recorded" in line for line in verify_checkpoint(tmp_path / "none"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("build", [tiny_transformer, tiny_qwen3])
def test_what_is_verified_is_what_is_loaded(tmp_path, build, dtype):
    """Diffusers keeps some weights of a bfloat16 model in float32: recorded output and loaded model must agree on that."""
    model = build()
    patch_model(model)
    report = verify_checkpoint(export_checkpoint(model, tmp_path / "out", dtype=dtype))
    assert len([line for line in report if "bit-equal" in line]) == 2


def test_weights_that_are_not_finite(folder):
    def edit(tensors):
        tensors["model.norm.weight"][3] = float("inf")

    edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(ValueError, match="the content of model.safetensors has changed"):
        verify_checkpoint(folder)
    reseal(folder)
    with pytest.raises(ValueError, match=r"model.norm.weight holds 1 values that are not finite, of 64"):
        verify_checkpoint(folder)


def test_a_model_that_computes_nonsense_is_not_exported(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    patch_model(model)
    with pytest.raises(ValueError, match="output of the model for a reference input is not finite"):
        export_checkpoint(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_other_outputs_than_the_recorded_ones(folder, tmp_path):
    """Hashes and headers are in order, and yet it is another model: one weight, or another kind of attention."""

    def scale(tensors):
        tensors["model.layers.1.self_attn.v_proj.weight"] *= 1.02

    edit_tensors(folder / "model.safetensors", scale)
    reseal(folder)
    with pytest.raises(ValueError, match=r"the original_output for the reference input differs from the recorded one by"):
        verify_checkpoint(folder)

    model = tiny_qwen3()
    outputs = {}
    for name, spec in (("plain", QuantSpec()), ("rotated", QuantSpec(rotate=True))):
        patch_model(model, AttnQATConfig(spec=spec))
        outputs[name] = export_checkpoint(model, tmp_path / name) / "qat_patch_reference.safetensors"
        unpatch_model(model)
    outputs["rotated"].write_bytes(outputs["plain"].read_bytes())
    reseal(tmp_path / "rotated")
    with pytest.raises(ValueError, match=r"the output for the reference input differs from the recorded one by"):
        verify_checkpoint(tmp_path / "rotated")


def test_a_reference_that_is_missing(folder):
    (folder / "qat_patch_reference.safetensors").unlink()
    with pytest.raises(ValueError, match="qat_patch_reference.safetensors is missing"):
        verify_checkpoint(folder)
    reseal(folder)
    with pytest.raises(ValueError, match="references: '' has no qat_patch_reference.safetensors"):
        verify_checkpoint(folder)
    reseal(folder, references={})
    assert any("no reference output was recorded" in line for line in verify_checkpoint(folder))


def test_adapters_of_a_base_in_another_type_than_it_is_stored_in(tmp_path):
    """As the recipes train them under mixed precision: frozen weights in bfloat16, adapters in float32."""
    tiny_qwen3().save_pretrained(tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16))
    patch_model(model)
    export_checkpoint(model, tmp_path / "out", merge_adapters=False, base_model=str(tmp_path / "base"))
    assert sum("bit-equal" in line for line in verify_checkpoint(tmp_path / "out")) == 2
