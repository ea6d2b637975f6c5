"""Both transformers of Wan 2.2 in one run: who is trained when and on what, resuming, exports for both, samples of the whole."""

import json
import shutil
from functools import partial

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file

import finetune_wan
from qat_patch import get_handle, load_checkpoint
from qat_patch.checkpoint.load import component_of
from qat_recipes.data.video import EncodedClips
from qat_recipes.tasks import samples
from qat_recipes.tasks.flow_matching import FlowMatching
from qat_recipes.tasks.video_diffusion import EXPERTS
from support.models.tiny_clips import write_clips
from support.models.tiny_wan import tiny_pipeline
from support.runs.runs import SHARDED, command_line, log, run, run_in_two_processes, uninterrupted_runs, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
RUN = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "seed": 4, "eval_timesteps": 2, "model.transformer": "both"}
RUN |= {"eval_every": 4, "checkpoint_every": 2, "calibration_batches": 1}
BARE = {"data.eval": ..., "eval_every": 0, "checkpoint_every": 0, "calibration_batches": 0}
LORA = {"lora.rank": 2, "lora.alpha": 4, "lora.export": "adapters"}
KINDS = {"full": {"ema_decay": 0.5, "accumulation_steps": 2, "layers_every": 2}, "lora": LORA | {"distillation": 0.5}}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline(transformer_2=True, layers=1).save_pretrained(folder / "wan2.2")
    write_clips(folder / "train", 7)
    write_clips(folder / "eval", 1, seed=5)
    return folder


def settings(inputs, output_dir, **changes):
    places = {"model.path": inputs / "wan2.2", "data.train": inputs / "train", "data.eval": inputs / "eval"}
    return places | RUN | {"output_dir": output_dir} | changes


def finetune(inputs, output_dir, **changes):
    run(finetune_wan, settings(inputs, output_dir, **changes))
    return log(output_dir)


@pytest.fixture(scope="module")
def references(inputs, tmp_path_factory):
    return uninterrupted_runs(partial(finetune, inputs), KINDS, tmp_path_factory.mktemp("references"))


def experts_of(records):
    """Whom the steps of a log trained."""
    names = [[key.removeprefix("loss/") for key in record if key.startswith("loss/")] for record in records]
    return [name for (name,) in names]


def exported(run):
    return {name: load_file(next((run / "export" / name).glob("*.safetensors"))) for name in EXPERTS}


def test_what_a_run_measures_calibrates_and_exports(references, inputs):
    for kind in KINDS:
        before, *steps = log(references / kind)
        assert {*experts_of(steps)} == {*EXPERTS}
        for name in EXPERTS:
            for record in (before, steps[-1]):
                assert record[f"eval_loss_fp4/{name}"] > 0 and record[f"eval_loss_original/{name}"] > 0
            # What stock Diffusers loads is what was trained, in its place.
            folder = references / kind / "export" / name
            assert component_of(folder) == name
            model = load_checkpoint(folder)
            assert {*get_handle(model).k_shift} == {"blocks.0.attn1", "blocks.0.attn2"}
            start = weights(inputs / "wan2.2" / name)
            if kind == "full":
                end = model.state_dict()
                assert end.keys() == start.keys() and not torch.equal(end["proj_out.weight"], start["proj_out.weight"])
        shifts = [get_handle(load_checkpoint(references / kind / "export" / name)).k_shift for name in EXPERTS]
        assert not torch.equal(shifts[0]["blocks.0.attn1"], shifts[1]["blocks.0.attn1"])
    detailed = log(references / "full")[2]
    assert {f"quantization_error/{name}.blocks.0.attn1" for name in EXPERTS} < detailed.keys()
    (trained,) = experts_of([detailed])
    assert {key.split(".")[0] for key in detailed if key.startswith("grad_norm/")} == {f"grad_norm/{trained}", "grad_norm/rest"}


def test_files_for_others(references, inputs):
    """Two LoRA files, each for its transformer of a plain pipeline."""
    pipe = WanPipeline.from_pretrained(inputs / "wan2.2")
    folder = references / "lora" / "export"
    pipe.load_lora_weights(folder / "transformer", adapter_name="high")
    pipe.load_lora_weights(folder / "transformer_2", adapter_name="low", load_into_transformer_2=True)
    assert pipe.transformer.peft_config.keys() == {"high"} and pipe.transformer_2.peft_config.keys() == {"low"}
    for name, adapter in zip(EXPERTS, ("high", "low"), strict=True):
        state, stored = getattr(pipe, name).state_dict(), exported(references / "lora")[name]
        assert stored and all(key.startswith("transformer.blocks.0.") for key in stored)
        for key, x in stored.items():
            loaded = key.removeprefix("transformer.").replace(".weight", f".{adapter}.weight")
            assert torch.equal(state[loaded], x)
        assert "load_into_transformer_2=True" in (folder / name / "README.md").read_text() or name == "transformer"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit(references, inputs, tmp_path, kind):
    shutil.copytree(references / kind, tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-4"))
    finetune(inputs, tmp_path / "run", resume="latest", **KINDS[kind])
    assert log(tmp_path / "run") == log(references / kind)
    for name, state in exported(references / kind).items():
        again = exported(tmp_path / "run")[name]
        assert state.keys() == again.keys() and all(torch.equal(state[key], again[key]) for key in state)


def test_a_step_trains_one_expert_on_its_own_noise(inputs, tmp_path, monkeypatch):
    """And the other one has no gradient, no moments and no decay: each has an optimizer of its own."""
    drawn, draw = [], FlowMatching.inputs
    monkeypatch.setattr(FlowMatching, "inputs", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    changes = BARE | {"steps": 12, "accumulation_steps": 2, "batch_size": 4, "checkpoint_every": 12}
    names = experts_of(finetune(inputs, tmp_path / "run", **changes))
    assert {flow.arguments["expert"] for flow in drawn} == {*EXPERTS}
    for flow in drawn:
        assert ((flow.sigmas >= 0.5) == (flow.arguments["expert"] == "transformer")).all()
    # Three quarters of the noise levels, for a shift of 3 and a boundary at 0.5.
    assert 0 < names.count("transformer") < 12
    state = torch.load(tmp_path / "run" / "checkpoint-12" / "optimizer.bin", weights_only=True)
    steps = [int(values["step"]) for values in state["state"].values()]
    assert {*steps} == {names.count(name) for name in EXPERTS}
    monkeypatch.setattr(FlowMatching, "inputs", draw)
    one = finetune(inputs, tmp_path / "one", **BARE | {"steps": 1, "weight_decay": 0.9})
    (name,) = experts_of(one)
    (other,) = {*EXPERTS} - {name}
    start, end = weights(inputs / "wan2.2" / other), exported(tmp_path / "one")[other]
    assert all(torch.equal(start[key], end[key]) for key in start)


def test_samples_are_of_both(inputs, tmp_path, monkeypatch):
    videos = {}
    monkeypatch.setattr(samples, "encode_video", lambda frames, fps, path: videos.update({path: frames}))
    options = {"samples.every": 1, "samples.clips": 1, "samples.inference_steps": 4, "samples.guidance_scale": 1, "steps": 1}
    finetune(inputs, tmp_path / "run", **options, eval_every=1, checkpoint_every=0)
    taken = [videos[f"{tmp_path}/run/samples/step-{step}/clip-0-{name}.mp4"] for step in (0, 1) for name in ("original", "fp4")]
    assert all(not torch.equal(a, b) for i, a in enumerate(taken) for b in taken[:i])
    pipe = WanPipeline.from_pretrained(inputs / "wan2.2")
    calls = []
    for name in EXPERTS:
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    embeds = EncodedClips(inputs / "eval")[0]["prompt_embeds"][None].float()
    sizes = {"height": 32, "width": 48, "num_frames": 5, "generator": torch.Generator().manual_seed(0)}
    frames = pipe(prompt_embeds=embeds, num_inference_steps=4, guidance_scale=1, **sizes, output_type="pt").frames[0]
    assert {*calls} == {*EXPERTS}
    assert (taken[0].permute(0, 3, 1, 2).float() - 255 * frames).abs().max() <= 1


@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_the_same_expert(inputs, tmp_path, name):
    """DDP, where the other one takes no part in the reduction, and FSDP2, with samples."""
    changes = {"steps": 3, "batch_size": 1, "checkpoint_every": 0, "eval_every": 3}
    if name == "fsdp":
        changes |= {"mixed_precision": "bf16", "distillation": 0.5, "samples.every": 3, "samples.clips": 1}
        changes |= {"samples.inference_steps": 2, "samples.guidance_scale": 1}
    (tmp_path / "program.py").write_text(SHARDED if name == "fsdp" else "import finetune_wan\nfinetune_wan.main()\n")
    recipe = ["finetune_wan"] if name == "fsdp" else []
    arguments = command_line(settings(inputs, tmp_path / "two", **changes))
    run_in_two_processes([str(tmp_path / "program.py"), *recipe, *arguments])
    before, *steps = log(tmp_path / "two")
    # One process with as many clips a step draws the same experts.
    assert experts_of(steps) == experts_of(finetune(inputs, tmp_path / "one", **BARE | {"steps": 3}))
    assert {*experts_of(steps)} == {*EXPERTS}
    assert all(record[f"eval_loss_fp4/{expert}"] > 0 for expert in EXPERTS for record in (before, steps[-1]))
    assert len(list((tmp_path / "two").rglob("*.mp4"))) == (4 if name == "fsdp" else 0)
    for expert, state in exported(tmp_path / "two").items():
        start = weights(inputs / "wan2.2" / expert)
        assert state.keys() == start.keys() and not torch.equal(state["proj_out.weight"], start["proj_out.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.path": "one"}, "one has no transformer_2"),
        ({"model.path": "no-boundary"}, "no-boundary has no boundary_ratio"),
        ({"model.path": "all-high"}, r"no noise level is left for transformer_2: boundary_ratio is 0\.0, and levels go from"),
        (LORA | {"lora.start.path": ".", "lora.start.use": "merged"}, r"lora\.start\.path_2: expected the LoRA of transformer_2"),
    ],
)
def test_what_cannot_be_done_is_refused(inputs, tmp_path, changes, message):
    if "model.path" in changes:
        folder = tmp_path / changes["model.path"]
        if folder.name == "one":
            tiny_pipeline(layers=1).save_pretrained(folder)
        else:
            tiny_pipeline(transformer_2=True, layers=1).save_pretrained(folder)
            index = json.loads((folder / "model_index.json").read_text())
            index["boundary_ratio"] = {"no-boundary": None, "all-high": 0.0}[folder.name]
            (folder / "model_index.json").write_text(json.dumps(index))
        changes = changes | {"model.path": folder}
    with pytest.raises(ValueError, match=message):
        finetune(inputs, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
