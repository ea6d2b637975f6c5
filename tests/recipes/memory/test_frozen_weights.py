"""Frozen weights in float8 and NF4 under adapters: what they compute, runs with them, and exports of the model's own weights."""

import builtins
import shutil

import pytest
import torch
from safetensors.torch import load_file

import finetune_qwen3
import finetune_wan
from qat_patch import get_handle, load_checkpoint, patch_model
from qat_recipes.lora.start import StartSettings
from qat_recipes.training.adapters import LoraSettings, add_adapters
from qat_recipes.training.objective import make_teacher
from support.models.exports import velocity
from support.models.tiny_clips import batch, objective, write_clips
from support.models.tiny_wan import tiny_pipeline, tiny_transformer
from support.runs.qwen3_runs import BARE
from support.runs.qwen3_runs import settings as qwen3_settings
from support.runs.runs import assert_same_run, log, run, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TARGETS = ("to_q", "to_v", "ffn.net.2")
RUN = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "seed": 3, "lora.rank": 2, "lora.alpha": 4, "checkpoint_every": 1}
FLOAT8 = {"lora.base_dtype": "float8", "model.gradient_checkpointing": "true"}
NF4 = {"lora.base_dtype": "nf4"}


def needs_library(kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")


def in_blocks(name):
    return name.startswith("blocks.") and "norm" not in name and "table" not in name


def rounded(kind, model):
    """The model with the weights that the kind holds, in their own type."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if in_blocks(name) and (kind == "float8" or name.endswith("weight")):
                if kind == "float8":
                    parameter.copy_(parameter.to(torch.float8_e4m3fn))
                else:
                    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

                    parameter.copy_(dequantize_4bit(*quantize_4bit(parameter.data, quant_type="nf4")))
    return model


def gradients(model, dtype):
    task, handle = objective(), patch_model(model)
    model.train()
    torch.manual_seed(1)
    inputs = task.inputs(batch())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = task.loss(task.outputs(model, inputs), inputs)
    loss.backward()
    assert handle.patched
    return loss, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["float8", "nf4"])
def test_gradients_are_those_of_rounded_weights(kind, dtype):
    needs_library(kind)
    models = [tiny_transformer(layers=2), tiny_transformer(layers=2)]
    for model in models:
        for name, parameter in model.named_parameters():
            if in_blocks(name):
                parameter.data = parameter.data.to(dtype)
    models[1], expected = rounded(kind, models[1]), None
    for base_dtype, model in zip((kind, None), models, strict=True):
        model.enable_gradient_checkpointing()
        settings = LoraSettings(rank=2, alpha=4, base_dtype=base_dtype)
        add_adapters(model, settings, TARGETS, seed=0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) / 4)
        trainable = {name for name, x in model.named_parameters() if x.requires_grad}
        assert trainable and all("lora" in name and model.get_parameter(name).dtype == torch.float32 for name in trainable)
        if base_dtype is not None:
            held = {
                x.dtype for name, x in model.named_parameters() if in_blocks(name) and "lora" not in name and "weight" in name
            }
            assert held == {torch.float8_e4m3fn if kind == "float8" else torch.uint8}
        found = gradients(model, dtype)
        if expected is None:
            expected = found
    assert expected[1].keys() == found[1].keys() == trainable
    if kind == "float8":
        assert torch.equal(expected[0], found[0]) and all(torch.equal(expected[1][name], found[1][name]) for name in trainable)
    # Sums in another order, after which some values are rounded to other codes.
    differences = torch.stack([(expected[1][name] - found[1][name]).norm() / found[1][name].norm() for name in trainable])
    assert differences.max() < (0.01 if dtype == torch.float32 else 0.1)


@pytest.fixture(scope="module")
def inputs_wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs_wan")
    tiny_pipeline(layers=1).save_pretrained(folder / "model")
    write_clips(folder / "clips", 4)
    return folder


def finetune(inputs_wan, output_dir, **changes):
    places = {"model.path": inputs_wan / "model", "data.train": inputs_wan / "clips", "output_dir": output_dir}
    run(finetune_wan, places | RUN | changes)
    return log(output_dir)


def exported(folder):
    model = load_checkpoint(folder)
    with get_handle(model).disabled():
        return velocity(model)


@pytest.mark.parametrize("kind", ["float8", "nf4"])
def test_a_run_and_its_exports(inputs_wan, tmp_path, kind):
    """Exact weights of the model with the adapters, or the adapters alone. The run resumes bit for bit."""
    needs_library(kind)
    changes = FLOAT8 if kind == "float8" else NF4
    whole = finetune(inputs_wan, tmp_path / "whole", **changes)
    plain = finetune(inputs_wan, tmp_path / "plain", **{"model.gradient_checkpointing": "true"})
    assert whole[0]["loss"] != plain[0]["loss"] and whole[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.1)
    start, end = weights(inputs_wan / "model/transformer"), weights(tmp_path / "whole/export")
    attention = {name for name in start if any(f"{part}.weight" in name for part in ("to_q", "to_k", "to_v", "to_out.0"))}
    assert {name for name in start if not torch.equal(start[name], end[name])} == attention
    saved = weights(tmp_path / "whole/checkpoint-2")
    assert all("lora" in name and x.dtype == torch.float32 for name, x in saved.items())
    finetune(inputs_wan, tmp_path / "alone", **changes, **{"lora.export": "adapters"})
    torch.testing.assert_close(exported(tmp_path / "alone/export"), exported(tmp_path / "whole/export"), rtol=1e-4, atol=1e-4)
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-2"))
    finetune(inputs_wan, tmp_path / "run", resume="latest", **changes)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kind", ["float8", "nf4"])
def test_a_language_model(inputs, tmp_path, kind):
    needs_library(kind)
    changes = BARE | {"lora.rank": 2, "lora.alpha": 4, "steps": 1} | (FLOAT8 if kind == "float8" else NF4)
    run(finetune_qwen3, qwen3_settings(inputs, tmp_path / "run", **changes))
    start, end = load_file(inputs / "model/model.safetensors"), weights(tmp_path / "run/export")
    changed = {name.split(".")[-2] for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_with_a_lora_to_start_from_and_a_teacher(tmp_path):
    """NF4 of the weights that it was merged into; beside a frozen one; the teacher has no adapters of one's own."""
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import save_file

    down, up = torch.randn(2, 32) / 2, torch.randn(32, 2) / 2
    prefix = "diffusion_model.blocks.0.self_attn.q"
    save_file({f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}, tmp_path / "theirs.safetensors")
    for use in ("merged", "frozen"):
        start = StartSettings(path=str(tmp_path), use=use)
        model = add_adapters(tiny_transformer(layers=1), LoraSettings(rank=2, alpha=4, base_dtype="nf4", start=start), TARGETS, 0)
        handle, task = patch_model(model), objective()
        inputs = task.inputs(batch())
        before = make_teacher(task, model, handle, None)(model, inputs)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".default." in name:
                    parameter.add_(0.1)
        assert torch.equal(make_teacher(task, model, handle, None)(model, inputs), before)
        exact = tiny_transformer(layers=1)
        exact.blocks[0].attn1.to_q.weight.data += up @ down
        distance = (before - task.outputs(exact, inputs)).norm() / before.norm()
        without = (before - task.outputs(tiny_transformer(layers=1), inputs)).norm() / before.norm()
        assert 0 < distance < 0.1 and distance < without


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.base_dtype": "float8"}, "lora.base_dtype: float8 needs model.gradient_checkpointing=true"),
        (FLOAT8 | {"compile": "inductor"}, "settings.compile: expected null with lora.base_dtype=float8, got inductor"),
        (NF4 | {"compile": "inductor"}, "settings.compile: expected null with lora.base_dtype=nf4, got inductor"),
        ({"lora.base_dtype": "fp4"}, "lora.base_dtype: expected bfloat16 or float32 or float8 or nf4, got 'fp4'"),
        ({"offload_activations": "true"}, "settings.offload_activations: there is no GPU to offload from, the run is on cpu"),
    ],
)
def test_what_cannot_be_done_is_refused(inputs_wan, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(inputs_wan, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_missing_library_is_named(inputs_wan, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] == "bitsandbytes":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    for changes, message in (
        (NF4, r"lora.base_dtype: nf4 needs bitsandbytes; pip install 'qat-patch\[low-memory\]'"),
        ({"optimizer": "adamw_8bit"}, r"settings.optimizer: adamw_8bit needs bitsandbytes; pip install"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(inputs_wan, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()
