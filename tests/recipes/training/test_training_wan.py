"""The recipe for Wan: flow matching, distillation, adapters, resuming to the last bit, samples, and what is refused."""

import json
import shutil
from functools import partial

import av
import pytest
import torch
from accelerate import Accelerator
from diffusers import WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image
from torch.utils.data import DataLoader
from transformers import get_scheduler

import finetune_wan
from qat_kernels import ops
from qat_patch import get_handle, load_checkpoint, patch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from qat_recipes.data.video import EncodedClips
from qat_recipes.tasks import samples
from qat_recipes.tasks.flow_matching import FlowMatching, HeldOutClips, noise_levels
from qat_recipes.training.adapters import LoraSettings, add_adapters
from qat_recipes.training.objective import evaluate, losses, make_teacher
from qat_recipes.training.optimization import make_optimizer
from support.models.clips_to_prepare import moving_square, prepare, write_video
from support.models.tiny_clips import batch, objective, write_clips
from support.models.tiny_wan import tiny_pipeline, tiny_ti2v, tiny_transformer
from support.runs.runs import (
    SHARDED,
    assert_same_run,
    command_line,
    log,
    run,
    run_in_two_processes,
    run_until_killed,
    uninterrupted_runs,
    weights,
)

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RUN = {"steps": 4, "batch_size": 2, "learning_rate": 3e-3, "seed": 3, "eval_timesteps": 2}
RUN |= {"eval_every": 4, "checkpoint_every": 2, "distillation": 0.5}
# Without held-out clips and checkpoints: steps only.
BARE = {"data.eval": ..., "eval_every": 0, "checkpoint_every": 0, "steps": 2, "distillation": 0}
KINDS = {
    "full": {"model.gradient_checkpointing": "true", "samples.every": 4, "samples.clips": 1, "samples.inference_steps": 2},
    "lora": {"lora.rank": 4, "lora.alpha": 8, "lora.dropout": 0.1},
}


def loud(transformer):
    """With attention so strong that 4 bits show, and values so far from zero that what they show can be unlearned."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "to_v.bias" in name:
                parameter += 8 * torch.randn_like(parameter)
            if "to_out.0.weight" in name:
                parameter *= 4
    return transformer


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    for name, i2v in (("t2v", False), ("i2v", True)):
        pipe = tiny_pipeline(i2v, layers=1)
        loud(pipe.transformer)
        pipe.save_pretrained(folder / name)
        write_clips(folder / f"{name}-train", 7, i2v)
    write_clips(folder / "eval", 2, seed=5)
    shutil.copytree(folder / "t2v" / "transformer", folder / "bare")
    return folder


def settings(inputs, output_dir, **changes):
    places = {"model.path": inputs / "t2v", "data.train": inputs / "t2v-train", "data.eval": inputs / "eval"}
    return places | RUN | {"output_dir": output_dir} | changes


def finetune(inputs, output_dir, **changes):
    run(finetune_wan, settings(inputs, output_dir, **changes))
    return log(output_dir)


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


def test_image_to_video_trains_and_samples(inputs, tmp_path):
    changes = {"model.path": inputs / "i2v", "data.train": inputs / "i2v-train", "data.eval": ..., "data.eval_fraction": 0.2}
    changes |= {"samples.every": 1, "samples.clips": 1, "samples.inference_steps": 1, "samples.guidance_scale": 1}
    finetune(inputs, tmp_path / "run", **changes, steps=1, eval_every=1, checkpoint_every=0, distillation=0)
    assert len(list((tmp_path / "run" / "samples").rglob("*.mp4"))) == 4
    start, end = weights(inputs / "i2v" / "transformer"), weights(tmp_path / "run" / "export")
    assert not torch.equal(start["blocks.0.attn2.add_k_proj.weight"], end["blocks.0.attn2.add_k_proj.weight"])


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


def test_each_expert_is_trained_on_its_part_of_the_schedule(inputs, tmp_path, monkeypatch):
    tiny_pipeline(transformer_2=True, layers=1).save_pretrained(tmp_path / "wan2.2")
    drawn, draw = [], FlowMatching.inputs
    monkeypatch.setattr(FlowMatching, "inputs", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    for name, is_high in (("transformer", True), ("transformer_2", False)):
        drawn.clear()
        changes = {"model.path": tmp_path / "wan2.2", "model.transformer": name, "batch_size": 4}
        finetune(inputs, tmp_path / name, **BARE | changes)
        assert all(((inputs.sigmas >= 0.5) == is_high).all() for inputs in drawn)
        start, end = weights(tmp_path / "wan2.2" / name), weights(tmp_path / name / "export")
        assert max((start[key] - end[key]).abs().max().item() for key in start) < 0.01


def prepared_for(pipe, folder, size):
    """Two videos as `qat-patch prepare-wan-data` encodes them for a pipeline; the index, and settings of a run."""
    pipe.save_pretrained(folder / "model")
    for number in (1, 2):
        write_video(folder / f"clips/{number}.mp4", moving_square(5, *size)[::number].repeat(number, 0)[:5])
        (folder / f"clips/{number}.txt").write_text("a red square moves right")
    index = prepare(folder / "model", folder / "clips", folder / "data", "--resolutions", "x".join(map(str, size)))
    return index, BARE | {"model.path": folder / "model", "data.train": folder / "data"}


def test_ti2v_5b_from_a_video_to_an_export(tmp_path, monkeypatch):
    """Its pipeline gives every token a timestep; the recipe gives one for all."""
    index, changes = prepared_for(tiny_ti2v(), tmp_path, (64, 96))
    assert [clip["shapes"]["latents"] for clip in index["clips"]] == [[4, 2, 4, 6]] * 2
    drawn, draw = [], FlowMatching.inputs
    monkeypatch.setattr(FlowMatching, "inputs", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    changes |= {"samples.every": 1, "samples.prompts": "[a]"}
    size = {"samples.height": 64, "samples.width": 96, "samples.num_frames": 5, "samples.inference_steps": 1}
    finetune(tmp_path, tmp_path / "run", **changes | size)
    with av.open(str(tmp_path / "run/samples/step-2/prompt-0-fp4.mp4")) as container:
        assert next(container.decode(video=0)).to_ndarray().shape[1] == 96

    model, arguments = load_checkpoint(tmp_path / "run/export"), dict(drawn[0].arguments)
    one, each = arguments["timestep"], arguments["timestep"][:, None].expand(-1, 2 * 2 * 3)
    assert one.unique().numel() == 2
    with torch.no_grad(), get_handle(model).disabled():
        outputs = [model(**arguments | {"timestep": timestep}).sample for timestep in (one, each)]
    torch.testing.assert_close(*outputs)


def test_first_and_last_frame(inputs, tmp_path, monkeypatch):
    """FLF2V: a sample of a batch gets its own two frames."""
    _, changes = prepared_for(tiny_pipeline(i2v=True, layers=1, pos_embed_seq_len=2 * 257), tmp_path, (32, 48))
    own = {"samples.every": 1, "samples.height": 32, "samples.width": 48, "samples.num_frames": 5, "samples.prompts": "[a]"}
    with pytest.raises(ValueError, match="samples: .* needs a last frame too"):
        finetune(tmp_path, tmp_path / "run", **changes | own)
    drawn, draw = [], FlowMatching.inputs
    monkeypatch.setattr(FlowMatching, "inputs", lambda *args: drawn.append((args[1], draw(*args))) or drawn[-1][1])
    finetune(tmp_path, tmp_path / "run", **changes)
    (batch, flow), model = drawn[0], load_checkpoint(tmp_path / "run/export")
    images, arguments = batch["image_embeds"].float(), flow.arguments
    assert not torch.equal(images[0], images[1]) and not torch.equal(images[:, 0], images[:, 1])
    with torch.no_grad(), get_handle(model).disabled():
        both = model(**arguments).sample
        for number in range(2):
            own = {name: value[number, None] for name, value in arguments.items()}
            torch.testing.assert_close(model(**own | {"encoder_hidden_states_image": images[number]}).sample[0], both[number])
    with pytest.raises(ValueError, match="does not fit the model: expected images as its condition: 2, got 1"):
        finetune(tmp_path, tmp_path / "other", **changes | {"data.train": inputs / "i2v-train"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": "bare"}, r"timesteps\.flow_shift: model\.path has no scheduler"),
        ({"model.path": "bare", "samples.every": 2}, "samples: .*bare has no VAE to make videos with"),
        ({"model.path": "eval"}, "expected a Wan pipeline or transformer in Diffusers' format"),
        ({"model.path": "ti2v"}, r"expand_timesteps\), which is not supported; train it as a WanPipeline"),
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


def test_a_bare_transformer_trains_with_a_shift(inputs, tmp_path):
    changes = {"model.path": inputs / "bare", "timesteps.flow_shift": 3}
    finetune(inputs, tmp_path / "bare", **BARE | changes)
    finetune(inputs, tmp_path / "pipeline", **BARE)
    assert_same_run(tmp_path / "bare", tmp_path / "pipeline")


def test_samples_of_your_own_prompts_and_first_frames(inputs, tmp_path, monkeypatch):
    """Without held-out clips; what is written is what the pipeline makes of them."""
    videos = {}
    monkeypatch.setattr(samples, "encode_video", lambda frames, fps, path: videos.update({path: (frames, fps)}))
    Image.fromarray(torch.randint(0, 255, (70, 90, 3), dtype=torch.uint8).numpy()).save(tmp_path / "first.png")
    own = {"samples.every": 1, "samples.inference_steps": 2, "samples.height": 32, "samples.width": 48, "samples.num_frames": 5}
    own |= {"samples.prompts": "[a red square, a green square]", "steps": 1, "samples.negative_prompt": "blue"}
    types = {"text_encoder": torch.bfloat16, "default": torch.float32}
    for name, kind in (("t2v", WanPipeline), ("i2v", WanImageToVideoPipeline)):
        videos.clear()
        changes = BARE | KINDS["lora"] | own | {"model.path": inputs / name, "data.train": inputs / f"{name}-train"}
        if name == "i2v":
            changes["samples.images"] = f"[{tmp_path / 'first.png'}, {tmp_path / 'first.png'}]"
        finetune(inputs, tmp_path / name, **changes)
        paths = {f"step-{s}/prompt-{n}-{a}.mp4" for s in (0, 1) for n in (0, 1) for a in ("original", "fp4")}
        assert {path.removeprefix(f"{tmp_path}/{name}/samples/") for path in videos} == paths
        pipe = kind.from_pretrained(inputs / name, dtype=types)
        image = {}
        if name == "i2v":
            image = {"image": pipe.video_processor.resize(Image.open(tmp_path / "first.png"), 32, 48, resize_mode="crop")}
        size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2}
        text = {"prompt": "a green square", "negative_prompt": "blue"}
        expected = pipe(**text, **image, **size, generator=torch.Generator().manual_seed(1), output_type="pt").frames[0]
        frames, fps = videos[f"{tmp_path}/{name}/samples/step-0/prompt-1-original.mp4"]
        assert fps == 16 and (frames.permute(0, 3, 1, 2).float() - 255 * expected).abs().max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples.clips": 1}, "samples.clips: has no effect with samples.prompts"),
        ({"samples.prompts": "[]"}, "samples.height: has no effect without samples.prompts"),
        ({"samples.width": ...}, "samples: 'width' is missing; prompts need a size"),
        ({"samples.width": 40}, "samples.width: expected a multiple of 16, got 40"),
        ({"samples.num_frames": 6}, "samples.num_frames: expected a multiple of 4 plus 1, got 6"),
        ({"samples.images": "[a.png]"}, "samples.images: there is no file a.png"),
        ({"samples.images": "[a.png, b.png]"}, "samples.images: expected one for each of 1 prompts, got 2"),
        ({"model.path": "i2v", "data.train": "i2v-train"}, "samples.images: expected first frames, because the model"),
    ],
)
def test_prompts_that_cannot_be_sampled(inputs, tmp_path, changes, message):
    own = {"samples.every": 1, "samples.height": 32, "samples.width": 48, "samples.num_frames": 5, "samples.prompts": "[a]"}
    for name in {"model.path", "data.train"} & changes.keys():
        changes = changes | {name: inputs / changes[name]}
    with pytest.raises(ValueError, match=message):
        finetune(inputs, tmp_path / "run", **BARE | own | changes)
    assert not (tmp_path / "run").exists()
