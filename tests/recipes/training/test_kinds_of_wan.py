"""The recipe for Wan with every kind of its models, and videos of your own prompts during a run."""

import av
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from qat_patch import get_handle, load_checkpoint
from qat_recipes.data.video import Draw, EncodedClips
from qat_recipes.tasks import samples
from qat_recipes.tasks.flow_matching import FlowMatching, TimestepSettings, noise_levels
from support.models.clips_to_prepare import moving_square, prepare, write_video
from support.models.tiny_clips import batch, objective, write_clips
from support.models.tiny_wan import tiny_pipeline, tiny_ti2v
from support.runs.runs import assert_same_run, weights
from support.runs.wan_runs import BARE, KINDS, finetune, write_inputs

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_image_to_video_trains_and_samples(inputs, tmp_path):
    changes = {"model.path": inputs / "i2v", "data.train": inputs / "i2v-train", "data.eval": ..., "data.eval_fraction": 0.2}
    changes |= {"samples.every": 1, "samples.clips": 1, "samples.inference_steps": 1, "samples.guidance_scale": 1}
    finetune(inputs, tmp_path / "run", **changes, steps=1, eval_every=1, checkpoint_every=0, distillation=0)
    assert len(list((tmp_path / "run" / "samples").rglob("*.mp4"))) == 4
    start, end = weights(inputs / "i2v" / "transformer"), weights(tmp_path / "run" / "export")
    assert not torch.equal(start["blocks.0.attn2.add_k_proj.weight"], end["blocks.0.attn2.add_k_proj.weight"])


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


def test_ti2v_5b_from_first_frames(tmp_path, monkeypatch):
    """What the transformer gets is what Diffusers' pipeline gives it, and what it says of the given frame does not count."""
    _, changes = prepared_for(tiny_ti2v(), tmp_path, (64, 96))
    drawn, draw = [], FlowMatching.inputs
    monkeypatch.setattr(FlowMatching, "inputs", lambda *args: drawn.append((args[1], draw(*args))) or drawn[-1][1])
    Image.fromarray(torch.randint(0, 255, (70, 90, 3), dtype=torch.uint8).numpy()).save(tmp_path / "first.png")
    changes |= {
        "data.first_frame": 1,
        "samples.every": 1,
        "samples.prompts": "[a]",
        "samples.images": f"[{tmp_path / 'first.png'}]",
    }
    size = {"samples.height": 64, "samples.width": 96, "samples.num_frames": 5, "samples.inference_steps": 1}
    finetune(tmp_path, tmp_path / "run", **changes | size)
    batch, flow = drawn[0]
    assert batch["first_frame"].all()
    latents, timesteps = batch["latents"].float(), flow.sigmas.flatten()[:, None] * 1000
    assert torch.equal(flow.arguments["hidden_states"][:, :, 0], latents[:, :, 0])
    assert not torch.equal(flow.arguments["hidden_states"][:, :, 1], latents[:, :, 1])

    pipe, seen = WanImageToVideoPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32), {}
    handle = pipe.transformer.register_forward_pre_hook(lambda module, args, given: seen.update(given), with_kwargs=True)
    frame = Image.fromarray(moving_square(5, 64, 96)[0])
    pipe(frame, "a", height=64, width=96, num_frames=5, num_inference_steps=1, guidance_scale=1, output_type="latent")
    handle.remove()
    assert torch.equal(flow.arguments["timestep"] == 0, (seen["timestep"] == 0).expand(2, -1))
    assert torch.equal(flow.arguments["timestep"].amax(1, keepdim=True), timesteps)
    # The first latent frame of a video is that of its first frame alone.
    clip = next(
        clip
        for clip in EncodedClips(tmp_path / "data")
        if (clip["latents"][:, 0] - seen["hidden_states"][0, :, 0]).abs().max() < 0.05
    )
    assert "first_frame" not in clip

    model, objective = (
        load_checkpoint(tmp_path / "run/export").requires_grad_(True),
        FlowMatching(TimestepSettings(), *noise_levels(None, 5.0)),
    )
    outputs = objective.outputs(model, flow)
    assert (
        not outputs[:, :, 0].any()
        and not flow.velocity[:, :, 0].any()
        and outputs[:, :, 1].all()
        and flow.velocity[:, :, 1].all()
    )


def test_a_fraction_of_the_samples_is_given_its_first_frame(tmp_path):
    write_clips(tmp_path, 3)
    clips = EncodedClips(tmp_path, first_frame=0.25, seed=1)
    given = [clips[Draw(0, number)]["first_frame"].item() for number in range(200)]
    assert 30 < sum(given) < 70 and given == [clips[Draw(1, number)]["first_frame"].item() for number in range(200)]
    assert not clips[0]["first_frame"] and EncodedClips(tmp_path, first_frame=1)[0]["first_frame"]
    mixed = batch() | {"first_frame": torch.tensor([True, False])}
    flow = objective().inputs(mixed)
    assert (flow.arguments["timestep"] == 0).sum(1).tolist() == [6, 0]
    assert torch.equal(flow.arguments["hidden_states"][0, :, 0], mixed["latents"][0, :, 0])
    assert (flow.velocity == 0).flatten(2).sum(2)[:, 0].tolist() == [24, 0]


def test_first_and_last_frame(inputs, tmp_path, monkeypatch):
    """FLF2V: a sample of a batch gets its own two frames."""
    _, changes = prepared_for(tiny_pipeline(i2v=True, layers=1, pos_embed_seq_len=2 * 257), tmp_path, (32, 48))
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


def test_samples_between_two_frames(tmp_path, monkeypatch):
    """FLF2V, of prompts with your own images and of held-out clips; what is written is what the pipeline makes of them."""
    videos = {}
    monkeypatch.setattr(samples, "encode_video", lambda frames, fps, path: videos.update({path.rpartition("step-0/")[2]: frames}))
    _, changes = prepared_for(tiny_pipeline(i2v=True, layers=1, pos_embed_seq_len=2 * 257), tmp_path, (32, 48))
    for number in range(2):
        pixels = torch.randint(0, 255, (70, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
    changes |= {"steps": 1, "samples.every": 1, "samples.inference_steps": 1, "samples.guidance_scale": 1}
    size = {"height": 32, "width": 48, "num_frames": 5}
    own = {f"samples.{name}": value for name, value in size.items()}
    own |= {"samples.prompts": "[a red square]", "samples.images": f"[{tmp_path / '0.png'}]"}
    with pytest.raises(ValueError, match="samples.last_images: expected last frames, which the model takes"):
        finetune(tmp_path, tmp_path / "own", **changes | own)
    finetune(tmp_path, tmp_path / "own", **changes | own | {"samples.last_images": f"[{tmp_path / '1.png'}]"})
    finetune(tmp_path, tmp_path / "clips", **changes | {"data.eval_fraction": 0.5, "eval_every": 1, "samples.clips": 1})

    types = {"text_encoder": torch.bfloat16, "default": torch.float32}
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "model", dtype=types)
    first, last = (
        pipe.video_processor.resize(Image.open(tmp_path / f"{number}.png"), 32, 48, resize_mode="crop") for number in range(2)
    )
    options = size | {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "pt"}

    def made(name, *images, **text):
        generator = torch.Generator().manual_seed(0)
        expected = pipe(image=images[0], last_image=images[1], **text, **options, generator=generator).frames[0]
        return (videos[name].permute(0, 3, 1, 2).float() - 255 * expected).abs().max() <= 1

    assert made("prompt-0-original.mp4", first, last, prompt="a red square")
    assert not made("prompt-0-original.mp4", first, first, prompt="a red square")
    clip = EncodedClips(tmp_path / "data", slice(-1, None))[0]
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    with torch.no_grad():
        decoded = pipe.vae.decode(clip["latents"][None].float() * std + mean).sample
    frames = pipe.video_processor.postprocess_video(decoded, output_type="pil")[0]
    assert made("clip-0-original.mp4", frames[0], frames[-1], prompt_embeds=clip["prompt_embeds"][None].float())


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
        ({"samples.last_images": f"[{__file__}]"}, r"samples.last_images: expected \[\], because the model takes no last frame"),
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
