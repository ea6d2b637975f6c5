"""Runs that start from someone's LoRA: what is trained, what the teacher is, and what others read of the export."""

import shutil

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import finetune_wan
from qat_patch import get_handle, load_checkpoint, patch_model
from qat_patch.checkpoint.load import component_of
from qat_recipes.lora.start import StartSettings, merge
from qat_recipes.training.adapters import LoraSettings, add_adapters
from qat_recipes.training.objective import make_teacher
from support.models.exports import velocity
from support.models.tiny_clips import batch, objective, write_clips
from support.models.tiny_wan import tiny_pipeline, tiny_transformer
from support.runs.runs import assert_same_run, log, run, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FILE = "pytorch_lora_weights.safetensors"
RUN = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "seed": 3, "lora.rank": 2, "lora.alpha": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pipeline of two experts, clips, and a LoRA with ComfyUI's names as someone has trained it."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline(transformer_2=True, layers=1).save_pretrained(folder / "model")
    write_clips(folder / "clips", 4)
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, outputs in (("self_attn.q", 32), ("cross_attn.v", 32), ("ffn.0", 64)):
        tensors[f"diffusion_model.blocks.0.{name}.lora_down.weight"] = torch.randn(3, 32, generator=generator) / 3
        tensors[f"diffusion_model.blocks.0.{name}.lora_up.weight"] = torch.randn(outputs, 3, generator=generator) / 3
        tensors[f"diffusion_model.blocks.0.{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, folder / "theirs.safetensors")
    return folder


def settings(inputs, output_dir, use=None, **changes):
    places = {"model.path": inputs / "model", "data.train": inputs / "clips", "output_dir": output_dir}
    start = {} if use is None else {"lora.start.path": inputs / "theirs.safetensors", "lora.start.use": use}
    own = {"lora.rank": ..., "lora.alpha": ...} if use == "trained" else {}
    return places | RUN | start | own | changes


def finetune(inputs, output_dir, use=None, **changes):
    run(finetune_wan, settings(inputs, output_dir, use, **changes))
    return log(output_dir)


def stock(inputs, *loras, component="transformer"):
    """What Diffusers computes with LoRA files of these names and strengths."""
    pipe = WanPipeline.from_pretrained(inputs / "model")
    options = {"load_into_transformer_2": True} if component == "transformer_2" else {}
    for number, (path, _) in enumerate(loras):
        pipe.load_lora_weights(path, adapter_name=str(number), **options)
    model = getattr(pipe, component)
    if loras:
        model.set_adapters([str(number) for number in range(len(loras))], [strength for _, strength in loras])
    return velocity(model)


def exported(folder):
    model = load_checkpoint(folder)
    with get_handle(model).disabled():
        return velocity(model)


@pytest.mark.parametrize("use", ["frozen", "merged"])
def test_the_loaded_lora_acts_and_stays_and_the_trained_one_is_exported(inputs, tmp_path, use):
    """Alone, as `load_lora_weights` reads it beside theirs; or in whole weights with theirs."""
    theirs, changes = inputs / "theirs.safetensors", {"lora.start.strength": 0.7}
    alone = finetune(inputs, tmp_path / "alone", use, **changes, **{"lora.export": "adapters"})
    whole = finetune(inputs, tmp_path / "whole", use, **changes)
    assert alone == whole
    assert alone[0]["loss"] != finetune(inputs, tmp_path / "without")[0]["loss"]
    names = load_file(tmp_path / "alone/export" / FILE).keys()
    assert {name.split(".lora_")[0].rpartition("attn")[2][2:] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    expected = stock(inputs, (theirs, 0.7), (tmp_path / "alone/export", 1.0))
    assert (expected - stock(inputs, (theirs, 0.7))).norm() / expected.norm() > 1e-3
    torch.testing.assert_close(exported(tmp_path / "whole/export"), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(exported(tmp_path / "alone/export"), stock(inputs, (tmp_path / "alone/export", 1.0)))


def test_frozen_and_merged_train_the_same(inputs, tmp_path):
    one, other = finetune(inputs, tmp_path / "frozen", "frozen"), finetune(inputs, tmp_path / "merged", "merged")
    assert [record["loss"] for record in one] == pytest.approx([record["loss"] for record in other], rel=1e-5)
    frozen, merged = exported(tmp_path / "frozen/export"), exported(tmp_path / "merged/export")
    torch.testing.assert_close(frozen, merged, rtol=1e-3, atol=1e-3)


def test_theirs_is_trained_on(inputs, tmp_path):
    """With its rank, alpha and layers; the export is one LoRA, which ComfyUI reads under the names of the file it came from."""
    options = {"lora.export": "adapters", "lora.export_format": "comfyui", "model.transformer": "transformer_2"}
    finetune(inputs, tmp_path / "run", "trained", **options)
    before, after = load_file(inputs / "theirs.safetensors"), load_file(tmp_path / "run/export" / FILE)
    renamed = {name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): x for name, x in before.items()}
    assert after.keys() == renamed.keys()
    for name, x in renamed.items():
        assert torch.equal(after[name], x) if name.endswith("alpha") else 0 < (after[name] - x).abs().max() < 0.1
    assert component_of(tmp_path / "run/export") == "transformer_2"
    assert "load_into_transformer_2=True" in (tmp_path / "run/export/README.md").read_text()
    expected = stock(inputs, (tmp_path / "run/export", 1.0), component="transformer_2")
    torch.testing.assert_close(exported(tmp_path / "run/export"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use", ["frozen", "merged", "trained"])
def test_a_run_resumes_and_refuses_another_file(inputs, tmp_path, use):
    shutil.copytree(inputs, tmp_path / "in")
    changes = {"checkpoint_every": 1}
    finetune(tmp_path / "in", tmp_path / "whole", use, **changes)
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-2"))
    saved = weights(tmp_path / "run/checkpoint-1")
    assert all(".default." in name for name in saved)
    finetune(tmp_path / "in", tmp_path / "run", use, resume="latest", **changes)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    if use != "trained":  # of which the checkpoint holds all
        shutil.rmtree(tmp_path / "run/export")
        shutil.rmtree(tmp_path / "run/checkpoint-2")
        file = tmp_path / "in/theirs.safetensors"
        save_file({name: 1.01 * x for name, x in load_file(file).items()}, file)
        with pytest.raises(ValueError, match="resume: the weights of model.path changed since"):
            finetune(tmp_path / "in", tmp_path / "run", use, resume="latest", **changes)


@pytest.mark.parametrize("use", ["frozen", "merged"])
def test_the_teacher_is_what_the_run_starts_from(inputs, use):
    """The weights with their LoRA, in original attention, without what the trained adapters have learned."""
    start = StartSettings(path=str(inputs / "theirs.safetensors"), use=use)
    expected = tiny_transformer(layers=1)
    merge(expected, start)
    model = add_adapters(tiny_transformer(layers=1), LoraSettings(rank=2, alpha=4, start=start), ("to_q",), seed=0)
    handle, task = patch_model(model), objective()
    trainable = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trainable and all(".default." in name for name in trainable)
    with torch.no_grad():
        for name in trainable:
            model.get_parameter(name).add_(0.1)
    inputs_ = task.inputs(batch())
    teacher = make_teacher(task, model, handle, None)
    torch.testing.assert_close(teacher(model, inputs_), task.outputs(expected, inputs_), rtol=1e-4, atol=1e-4)
    with handle.disabled():
        assert not torch.allclose(task.outputs(model, inputs_), task.outputs(expected, inputs_), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.start.use": "trained"}, "lora.rank: with start.use=trained it is that of .*; leave it out"),
        ({"lora.start.use": "other"}, "lora.start.use: expected frozen or merged or trained, got 'other'"),
        ({"lora.start.path": "nowhere"}, "lora.start.path: there is no nowhere"),
        ({"lora.alpha": ...}, "'alpha' is missing"),
        ({"lora.export_format": "comfyui"}, "lora.export_format: comfyui is for adapters alone"),
        (
            {"lora.export": "adapters", "lora.export_format": "comfyui", "lora.target_modules": "[to_q, proj_out]"},
            "expected LoRA of the attention and feed-forward layers of a Wan transformer, got proj_out",
        ),
        (
            {"lora.start.use": "trained", "lora.rank": ..., "lora.alpha": ..., "distillation": 0.5},
            "lora.start.use: .* expected frozen or merged, got trained",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune(inputs, tmp_path / "run", "frozen", **changes)
    assert not (tmp_path / "run").exists()


def test_peft_reads_the_names_of_the_export(inputs, tmp_path):
    """PEFT itself, without Diffusers' loader: adapters of every linear layer of the blocks."""
    targets = "[to_q, to_k, to_v, to_out.0, ffn.net.0.proj, ffn.net.2]"
    finetune(inputs, tmp_path / "run", **{"lora.export": "adapters", "lora.target_modules": targets})
    state = {name.removeprefix("transformer."): x for name, x in load_file(tmp_path / "run/export" / FILE).items()}
    assert len(state) == 2 * (4 + 4 + 2)
    model = WanTransformer3DModel.from_pretrained(inputs / "model/transformer")
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets.strip("[]").split(", ")))
    from peft import set_peft_model_state_dict

    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys and not [name for name in result.missing_keys if "lora" in name]
    torch.testing.assert_close(velocity(model), exported(tmp_path / "run/export"))
