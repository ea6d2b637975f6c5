"""The recipe for Wan: flow matching, distillation, adapters, resuming to the last bit, samples, and what is refused."""

import json
from functools import partial

import av
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch.utils.data import DataLoader
from transformers import get_scheduler

import finetune_wan
from qat_kernels import ops
from qat_patch import get_handle, load_checkpoint, patch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from qat_recipes.data.video import EncodedClips
from qat_recipes.tasks import samples
from qat_recipes.tasks.flow_matching import HeldOutClips, noise_levels
from qat_recipes.training.adapters import LoraSettings, add_adapters
from qat_recipes.training.objective import evaluate, losses, make_teacher
from qat_recipes.training.optimization import make_optimizer
from support.models.tiny_clips import batch, objective
from support.models.tiny_wan import tiny_transformer
from support.runs.runs import (
    SHARDED,
    assert_same_run,
    command_line,
    log,
    run_in_two_processes,
    run_until_killed,
    uninterrupted_runs,
    weights,
)
from support.runs.wan_runs import BARE, KINDS, RUN, finetune, loud, settings, write_inputs

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def references(inputs, tmp_path_factory):
    return uninterrupted_runs(partial(finetune, inputs), KINDS, tmp_path_factory.mktemp("references"))


def measured(model, inputs, accelerator):
    loader = accelerator.prepare(DataLoader(HeldOutClips(EncodedClips(inputs / "eval"), 2, RUN["seed"]), 1))
    return evaluate(objective(), model, get_handle(model), loader, accelerator)


def test_a_run_logs_its_losses_and_exports_what_it_measured(references, inputs):
    for kind in KINDS:
        before, *steps = log(references / kind)
        # The starting weights are the teacher.
        assert before["eval_velocity_error_original"] == 0 < 1e-4 < before["eval_velocity_error_fp4"]
        for record in steps:
            assert record["loss"] == pytest.approx((record["task_loss"] + record["velocity_error"]) / 2, rel=1e-6)
            assert record["velocity_error"] > 0
        assert [record["tokens"] for record in steps] == [2 * 2 * 6 * step for step in range(1, 5)]
        again = measured(load_checkpoint(references / kind / "export"), inputs, Accelerator())
        # Adapters were added to the weights, and with them roundings.
        expected = {name: steps[-1][name] for name in again}
        assert again == (expected if kind == "full" else pytest.approx(expected, rel=1e-2))
        plain = WanTransformer3DModel.from_pretrained(references / kind / "export")
        assert get_handle(plain) is None
        exported, start = plain.state_dict(), weights(inputs / "bare")
        changed = {name for name in start if not torch.equal(exported[name], start[name])}
        attention = {name for name in start if any(f"{part}.weight" in name for part in ("to_q", "to_k", "to_v", "to_out.0"))}
        assert exported.keys() == start.keys() and (changed == attention if kind == "lora" else changed > attention)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_bit_for_bit(references, inputs, tmp_path, kind):
    run_until_killed(finetune_wan, settings(inputs, tmp_path / "run", **KINDS[kind]), "checkpoint-4")
    assert [record["step"] for record in log(tmp_path / "run")] == [0, 1, 2, 3, 4]
    assert not (tmp_path / "run" / "checkpoint-4").exists()
    finetune(inputs, tmp_path / "run", resume="latest", **KINDS[kind])
    assert_same_run(tmp_path / "run", references / kind)
    saved = weights(tmp_path / "run" / "checkpoint-4").keys()
    assert all("lora" in name for name in saved) if kind == "lora" else not any("lora" in name for name in saved)


def test_samples_are_videos_of_both_kinds_of_attention(references, inputs, tmp_path, monkeypatch):
    folder = references / "full" / "samples"
    names = {f"step-{step}/clip-0-{name}.mp4" for step in (0, 4) for name in ("original", "fp4")}
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4")} == names
    with av.open(str(folder / "step-4" / "clip-0-fp4.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(frames) == 5 and frames[0].shape == (32, 48, 3) and container.streams.video[0].average_rate == 16

    # What is written is what the pipeline makes of the clip's prompt.
    videos = {}
    monkeypatch.setattr(samples, "encode_video", lambda frames, fps, path: videos.update({path: frames}))
    options = {"samples.every": 1, "samples.clips": 1, "samples.inference_steps": 2, "samples.negative_prompt": "green"}
    finetune(inputs, tmp_path / "run", **KINDS["lora"] | options | {"steps": 1, "eval_every": 1, "checkpoint_every": 0})
    taken = [videos[f"{tmp_path}/run/samples/step-{step}/clip-0-{name}.mp4"] for step in (0, 1) for name in ("original", "fp4")]
    assert all(not torch.equal(a, b) for i, a in enumerate(taken) for b in taken[:i])
    pipe = WanPipeline.from_pretrained(inputs / "t2v", dtype={"text_encoder": torch.bfloat16, "default": torch.float32})
    embeds, text = EncodedClips(inputs / "eval")[0]["prompt_embeds"][None], {"num_inference_steps": 2, "negative_prompt": "green"}
    sizes = {"height": 32, "width": 48, "num_frames": 5, "generator": torch.Generator().manual_seed(0)}
    (expected,) = pipe(prompt_embeds=embeds.float(), **text, **sizes, output_type="pt").frames
    assert (taken[0].permute(0, 3, 1, 2).float() - 255 * expected).abs().max() <= 1


def test_distillation_brings_4_bit_attention_back_to_where_it_started(inputs, tmp_path):
    changes = {"distillation": 1, "steps": 30, "eval_every": 30, "checkpoint_every": 0, "batch_size": 4}
    first, *_, last = finetune(inputs, tmp_path / "run", **changes, learning_rate=1e-4, schedule="cosine")
    assert last["loss"] == last["velocity_error"]
    assert last["eval_velocity_error_fp4"] < 0.6 * first["eval_velocity_error_fp4"]


def test_the_loss_of_the_task_alone_needs_no_teacher(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("qat_recipes.training.loop.make_teacher", None)
    (record, _) = finetune(inputs, tmp_path / "run", **BARE)
    assert "velocity_error" not in record and "task_loss" not in record
    (control, _) = finetune(inputs, tmp_path / "control", **BARE, attention="original")
    assert record["loss"] != control["loss"] and record["loss"] == pytest.approx(control["loss"], rel=0.05)


def test_adapters_learn_the_same_with_gradient_checkpointing(inputs, tmp_path):
    # The backward pass runs the student's forward pass again: with adapters and through 4-bit attention.
    for name in ("true", "false"):
        changes = {"lora.rank": 4, "lora.alpha": 8, "distillation": 0.5, "model.gradient_checkpointing": name}
        finetune(inputs, tmp_path / name, **BARE | changes)
    assert_same_run(tmp_path / "true", tmp_path / "false")


def test_kept_attention_runs_once_a_step(inputs, tmp_path, monkeypatch):
    calls, forward = [], ops.forward
    monkeypatch.setattr(ops, "forward", lambda *inputs: calls.append(0) or forward(*inputs))
    counts = {}
    for name in ("true", "false"):
        changes = {"model.gradient_checkpointing": "true", "model.keep_attention": name, "steps": 1}
        finetune(inputs, tmp_path / name, **BARE | changes)
        counts[name] = len(calls)
        calls.clear()
    assert counts["false"] == 2 * counts["true"] > 0
    assert_same_run(tmp_path / "true", tmp_path / "false")
    kept = {"model.keep_attention": "true"}
    for more, message in (
        ({}, "model.keep_attention: expected model.gradient_checkpointing=true"),
        ({"model.gradient_checkpointing": "true", "offload_activations": "true"}, "offload_activations moves them"),
        (
            {"model.gradient_checkpointing": "true", "compile": "eager"},
            "settings.compile: expected null with model.keep_attention",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(inputs, tmp_path / "refused", **BARE | kept | more)


def test_adapters_are_float32_beside_frozen_bfloat16(inputs, tmp_path, monkeypatch):
    types = {}

    def remember(settings, model):
        types.update((name, (x.dtype, x.requires_grad)) for name, x in model.named_parameters())
        return make_optimizer(settings, model)

    monkeypatch.setattr("qat_recipes.training.loop.make_optimizer", remember)
    changes = {"lora.rank": 4, "lora.alpha": 8, "mixed_precision": "bf16", "distillation": 0.5, "steps": 1}
    (record,) = finetune(inputs, tmp_path / "run", **BARE | changes)
    assert record["grad_norm"] > 0 and record["velocity_error"] > 0
    assert {kind for name, kind in types.items() if "lora" in name} == {(torch.float32, True)}
    frozen = {name: kind for name, kind in types.items() if "lora" not in name}
    assert frozen["blocks.0.ffn.net.0.proj.weight"] == (torch.bfloat16, False)
    # What Diffusers keeps.
    assert frozen["blocks.0.scale_shift_table"] == (torch.float32, False)


def test_two_processes_share_model_and_teacher(inputs, tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    changes = {"mixed_precision": "bf16", "batch_size": 1, "steps": 1, "eval_every": 1, "checkpoint_every": 0}
    changes |= {"samples.every": 1, "samples.clips": 1, "samples.inference_steps": 1}
    arguments = command_line(settings(inputs, tmp_path / "run", **changes))
    run_in_two_processes([str(tmp_path / "sharded.py"), "finetune_wan", *arguments])
    before, after = log(tmp_path / "run")
    assert before["eval_velocity_error_original"] == 0 < before["eval_velocity_error_fp4"] and after["velocity_error"] > 0
    assert len(list((tmp_path / "run" / "samples").rglob("*.mp4"))) == 4
    again = measured(load_checkpoint(tmp_path / "run" / "export"), inputs, Accelerator(mixed_precision="bf16"))
    # A small difference of large numbers, in which codes flip.
    assert again.pop("eval_velocity_error_between") == pytest.approx(after["eval_velocity_error_between"], rel=0.5)
    assert again == pytest.approx({name: after[name] for name in again}, rel=2e-2)


def test_two_processes_share_each_sample(inputs, tmp_path, monkeypatch):
    def seeded(*args):
        torch.manual_seed(RUN["seed"])
        return get_scheduler(*args)

    # Loading a teacher draws random numbers; a copy does not.
    monkeypatch.setattr("qat_recipes.training.loop.get_scheduler", seeded)
    (tmp_path / "sharded.py").write_text(SHARDED)
    changes = {"mixed_precision": "bf16", "batch_size": 1, "steps": 2, "eval_every": 2, "checkpoint_every": 0}
    finetune(inputs, tmp_path / "one", **changes)
    changes |= {"parallel.ulysses": 2, "model.gradient_checkpointing": "true"}
    arguments = command_line(settings(inputs, tmp_path / "two", **changes))
    run_in_two_processes([str(tmp_path / "sharded.py"), "finetune_wan", *arguments])
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    # Timesteps that are rounded to bfloat16 would show here.
    assert one[0]["eval_loss_original"] == pytest.approx(two[0]["eval_loss_original"], rel=5e-4)
    for a, b in zip(one, two, strict=True):
        for name in ("velocity_error", "eval_velocity_error_between", "eval_velocity_error_fp4"):
            # Small differences of large numbers, and codes that flip.
            assert a.pop(name, 0) == pytest.approx(b.pop(name, 0), rel=0.5)
        # A step away codes have flipped. Twice the gradient would be seen.
        assert a == pytest.approx(b, rel=2e-2 if a["step"] < 2 else 0.1)
    load_checkpoint(tmp_path / "two" / "export")


def test_adapters_alone_belong_to_the_model_they_started_from(inputs, tmp_path):
    changes = {"lora.rank": 4, "lora.alpha": 8, "lora.export": "adapters", "lora.target_modules": "[to_q]"}
    changes |= {"steps": 1, "eval_every": 1, "checkpoint_every": 0}
    *_, last = finetune(inputs, tmp_path / "run", **changes)
    export = tmp_path / "run" / "export"
    assert all("to_q.lora" in name for name in weights(export))
    assert json.loads((export / "qat_patch.json").read_text())["base_model"] == str(inputs / "t2v")
    again = measured(load_checkpoint(export), inputs, Accelerator())
    assert again == {name: last[name] for name in again}


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8.0, dropout=0.5)], ids=["copy", "itself"])
def test_the_teacher_is_the_start_in_original_attention(monkeypatch, lora):
    calls, attention = [], diffusers_adapter.attention
    monkeypatch.setattr(diffusers_adapter, "attention", lambda *args, **kw: calls.append(1) or attention(*args, **kw))
    stock, model, flow = loud(tiny_transformer()), loud(tiny_transformer()), objective()
    if lora is not None:
        # No second model: nothing to copy it with.
        monkeypatch.setattr("qat_recipes.training.objective.copy", None)
        model = add_adapters(model, lora, ("to_q", "to_v"), seed=0)
    handle = patch_model(model)
    teacher = make_teacher(flow, model, handle, Accelerator())
    model.train()
    inputs = flow.inputs(batch())
    with torch.no_grad():
        expected = flow.outputs(stock, inputs)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        target = teacher(model, inputs)
    assert torch.equal(target, expected) and not target.requires_grad and not calls
    assert model.training and len(handle.patched) == sum(layer.quantizes for layer in handle.patched.values())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(("lora" in name) == (lora is not None) for name in trained)

    values = losses(flow, model, batch(), teacher, 0.25)
    assert len(calls) == 4  # two blocks, self and cross, of the student
    assert values["velocity_error"] > 0
    assert values["loss"].item() == pytest.approx((0.75 * values["task_loss"] + 0.25 * values["velocity_error"]).item())
    values["loss"].backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in trained)
    assert torch.equal(teacher(model, inputs), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": "bare"}, r"timesteps\.flow_shift: model\.path has no scheduler"),
        ({"model.path": "bare", "samples.every": 2}, "samples: .*bare has no VAE to make videos with"),
        ({"model.path": "eval"}, "expected a Wan pipeline or transformer in Diffusers' format"),
        ({"model.path": "ti2v"}, "expand_timesteps; train it as a WanPipeline, from images with data.first_frame"),
        ({"data.first_frame": 0.5}, "data.first_frame: only models with a timestep for each token"),
        ({"data.first_frame": 1.5}, r"data.first_frame: expected a number in \[0, 1\], got 1.5"),
        ({"model.path": "bare", "model.transformer": "transformer_2"}, "bare has no transformer_2"),
        ({"model.transformer": "transformer_2"}, "t2v has no transformer_2"),
        ({"model.path": "i2v"}, r"does not fit the model: expected input channels 12, got 4"),
        ({"samples.every": 2, "data.eval": ..., "eval_every": 0}, "samples: they are of held-out clips, and there are none"),
        ({"samples.every": 9}, r"samples\.every: expected at most steps \(4\), got 9"),
        ({"samples.every": 2, "samples.guidance_scale": 1, "samples.negative_prompt": "x"}, "no effect without guidance"),
        ({"distillation": 1.5}, r"distillation: expected a number in \[0, 1\], got 1\.5"),
        ({"distillation": 1, "attention": "original"}, "the model is its own teacher"),
        ({"timesteps.mode_scale": 1}, r"timesteps\.mode_scale: has no effect unless weighting_scheme is mode"),
        ({"timesteps.flow_shift": 0}, r"timesteps\.flow_shift: expected a positive number or null"),
        ({"lora.rank": 4}, "'alpha' is missing"),
        ({"lora.rank": 4, "lora.alpha": 8, "lora.target_modules": "[to_q, q_proj]"}, "has no module q_proj"),
        ({"parallel.ulysses": 1}, r"parallel\.ulysses: expected at least 2, or parallel=null, got 1"),
        ({"parallel.ulysses": 2, "calibration_batches": 1}, r"settings\.calibration_batches: expected 0 with parallel"),
        ({"parallel.ulysses": 2, "lora.rank": 4, "lora.alpha": 8}, r"settings\.lora: expected null with parallel"),
        ({"parallel.ulysses": 2}, r"settings\.parallel: needs FSDP2"),
        (
            {"lora.rank": 4, "lora.alpha": 8, "lora.export": "adapters", "model.export_dtype": "bfloat16"},
            "adapters alone are exported in float32",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(inputs, tmp_path, changes, message):
    if changes.get("model.path") == "ti2v":
        (inputs / "ti2v").mkdir()
        config = {"_class_name": "WanImageToVideoPipeline", "expand_timesteps": True, "transformer": [None, "a"]}
        (inputs / "ti2v" / "model_index.json").write_text(json.dumps(config))
    if "model.path" in changes:
        changes = changes | {"model.path": inputs / changes["model.path"]}
    with pytest.raises(ValueError, match=message):
        finetune(inputs, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"fixed shift, as Wan's are, got UniPC.* without use_flow_sigmas"):
        noise_levels({"_class_name": "UniPCMultistepScheduler"}, None)


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            LocalEntryNotFoundError("no network"),
            "model.path: org/wan is not a local folder and cannot be read from the Hub: no network",
        ),
        (EntryNotFoundError("404"), "samples: org/wan has no VAE"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_no_bare_transformer(inputs, tmp_path, monkeypatch, reason, message):
    def load_config(path, **options):
        try:
            raise reason
        except EntryNotFoundError:
            raise OSError(f"{path} does not appear to have a file named model_index.json") from None

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    with pytest.raises(ValueError, match=message):
        finetune(inputs, tmp_path / "run", **{"model.path": "org/wan", "samples.every": 2})
