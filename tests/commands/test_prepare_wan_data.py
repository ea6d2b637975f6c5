"""qat-patch prepare-wan-data: what it writes is what the pipelines compute, and what it refuses."""

import json
import weakref

import av
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file, safe_open

from qat_patch.commands import prepare_wan_data
from qat_recipes.data.video import EncodedClips
from support.models.clips_to_prepare import CAPTIONS, REASONS, TALL, WIDE, contents, moving_square, prepare, write_video
from support.models.tiny_wan import tiny_pipeline


def decoded(path):
    """All frames as PIL images, by the shortest way there is."""
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


def test_index_lists_the_clips_and_why_others_are_left_out(wan_models, clips, tmp_path, capsys):
    index = prepare(wan_models / "t2v", clips, tmp_path)
    shapes = {
        clip["source"]: (clip["frames"], clip["height"], clip["width"], clip["shapes"]["latents"]) for clip in index["clips"]
    }
    assert shapes == {
        "wide.mp4": (5, *WIDE, [4, 2, 4, 6]),
        "tall.mp4": (5, *TALL, [4, 2, 6, 4]),
        "sub/long.mkv": (9, *WIDE, [4, 3, 4, 6]),
    }
    assert {clip["source"]: clip["caption"] for clip in index["clips"]} == CAPTIONS
    assert index["skipped"].keys() == REASONS.keys()
    output = capsys.readouterr().out
    for source, reason in REASONS.items():
        assert reason in index["skipped"][source]
        assert f"left out: {source}: {index['skipped'][source]}\n" in output
    assert "3 clips; 5 left out\n  1 of 5 frames, 32x48\n  1 of 5 frames, 48x32\n  1 of 9 frames, 32x48\n" in output
    files = {f"clips/{source}.safetensors" for source in CAPTIONS}
    assert {clip["file"] for clip in index["clips"]} == files
    assert contents(tmp_path).keys() == files | {"index.json", "empty_caption.safetensors"}


def test_files_describe_themselves(prepared):
    index = json.loads((prepared / "index.json").read_text(encoding="utf-8"))
    for clip in index["clips"]:
        with safe_open(prepared / clip["file"], framework="pt") as tensors:
            metadata = json.loads(tensors.metadata()["clip"])
        shapes = {name: list(tensor.shape) for name, tensor in load_file(prepared / clip["file"]).items()}
        assert metadata | {"file": clip["file"], "shapes": shapes} == clip | {"settings": index["settings"]}


@torch.no_grad()
def test_the_pipeline_decodes_the_latents_to_what_the_vae_makes_of_the_video(wan_models, clips, prepared, monkeypatch):
    pipe = WanPipeline.from_pretrained(wan_models / "t2v")
    video = pipe.video_processor.preprocess_video(decoded(clips / "wide.mp4")[:5])
    expected = pipe.video_processor.postprocess_video(pipe.vae(video).sample, output_type="pt")
    latents = load_file(prepared / "clips/wide.mp4.safetensors")["latents"]
    # With a velocity of zero the pipeline does nothing to the latents that it is given but to decode them.
    monkeypatch.setattr(pipe.transformer, "forward", lambda hidden_states, **_: (torch.zeros_like(hidden_states),))
    size = {"height": 32, "width": 48, "num_frames": 5}
    decoded_latents = pipe("a", latents=latents[None], num_inference_steps=1, guidance_scale=1.0, output_type="pt", **size).frames
    torch.testing.assert_close(decoded_latents, expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.05


@torch.no_grad()
def test_text_is_stored_short_and_read_back_as_the_pipeline_encodes_it(wan_models, prepared):
    pipe = WanPipeline.from_pretrained(wan_models / "t2v")
    dataset = EncodedClips(prepared)
    for clip, tensors in zip(dataset.clips, dataset, strict=True):
        expected, _ = pipe.encode_prompt(clip["caption"], do_classifier_free_guidance=False, max_sequence_length=512)
        assert torch.equal(tensors["prompt_embeds"], expected[0])
        assert clip["shapes"]["prompt_embeds"] == [len(clip["caption"].split()), 32]
        assert list(tensors["latents"].shape) == clip["shapes"]["latents"]


def test_captions_that_are_cut_are_counted(wan_models, tmp_path, capsys):
    write_video(tmp_path / "in/clip.mp4", moving_square(5, 32, 48))
    (tmp_path / "in/clip.txt").write_text("a " * 600, encoding="utf-8")
    index = prepare(wan_models / "t2v", tmp_path / "in", tmp_path / "out")
    assert index["clips"][0]["shapes"]["prompt_embeds"] == [512, 32]
    assert "1 captions fill all 512 tokens" in capsys.readouterr().out


@torch.no_grad()
def test_image_to_video_stores_what_the_pipeline_conditions_on(wan_models, clips, tmp_path):
    index = prepare(wan_models / "i2v", clips, tmp_path)
    assert index["settings"]["pipeline"] == "WanImageToVideoPipeline"
    tensors = EncodedClips(tmp_path)[[clip["source"] for clip in index["clips"]].index("wide.mp4")]
    pipe = WanImageToVideoPipeline.from_pretrained(wan_models / "i2v")
    image = decoded(clips / "wide.mp4")[0]
    # As in WanImageToVideoPipeline.__call__.
    pixels = pipe.video_processor.preprocess(image, height=32, width=48)
    _, condition = pipe.prepare_latents(pixels, 1, 4, 32, 48, 5, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(tensors["condition"], condition[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tensors["image_embeds"], pipe.encode_image(image)[0], rtol=0, atol=1e-5)
    velocity = pipe.transformer(
        torch.cat([tensors["latents"], tensors["condition"]])[None],
        torch.tensor([500]),
        tensors["prompt_embeds"][None],
        tensors["image_embeds"][None],
    ).sample
    assert velocity.shape == tensors["latents"][None].shape


def test_first_and_last_frame(clips, tmp_path):
    """FLF2V: what is stored is what the pipeline makes of both frames."""
    tiny_pipeline(i2v=True, layers=1, pos_embed_seq_len=2 * 257).save_pretrained(tmp_path / "model")
    index = prepare(tmp_path / "model", clips, tmp_path / "out")
    assert index["settings"]["last_frame"] is True
    tensors = EncodedClips(tmp_path / "out")[[clip["source"] for clip in index["clips"]].index("wide.mp4")]
    pipe = WanImageToVideoPipeline.from_pretrained(tmp_path / "model")
    images = [decoded(clips / "wide.mp4")[number] for number in (0, 4)]
    # As in WanImageToVideoPipeline.__call__.
    first, last = (pipe.video_processor.preprocess(image, height=32, width=48) for image in images)
    _, condition = pipe.prepare_latents(first, 1, 4, 32, 48, 5, torch.float32, torch.device("cpu"), last_image=last)
    torch.testing.assert_close(tensors["condition"], condition[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(tensors["image_embeds"], pipe.encode_image(images), rtol=0, atol=1e-5)
    assert tensors["image_embeds"].shape == (2, 257, 16)
    (tmp_path / "model/transformer/config.json").unlink()
    with pytest.raises(ValueError, match=r"--model: .* lacks transformer/config\.json"):
        prepare(tmp_path / "model", clips, tmp_path / "other")


def test_bfloat16_is_stored_and_comes_from_the_same_float32_latents(wan_models, clips, prepared, tmp_path):
    prepare(wan_models / "t2v", clips, tmp_path, "--dtype", "bfloat16")
    for exact, rounded in zip(EncodedClips(prepared), EncodedClips(tmp_path), strict=True):
        assert torch.equal(rounded["latents"], exact["latents"].bfloat16())
        assert rounded["prompt_embeds"].dtype == torch.bfloat16
    pipe = prepare_wan_data.load_pipeline(str(wan_models / "i2v"), torch.bfloat16, "cpu")
    types = pipe.text_encoder.dtype, pipe.vae.dtype, pipe.image_encoder.dtype
    assert types == (torch.bfloat16, torch.float32, torch.float32)


def test_fingerprints_see_weights_and_constants():
    vae, same, other = tiny_pipeline().vae, tiny_pipeline().vae, tiny_pipeline().vae
    next(other.parameters()).data[0, 0, 0, 0, 0] += 1e-3
    digests = [prepare_wan_data.fingerprint(module) for module in (vae, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert prepare_wan_data.fingerprint(vae, [1.0]) != prepare_wan_data.fingerprint(vae, [2.0])


def test_the_encoders_are_dropped(wan_models, clips, tmp_path, monkeypatch):
    modules, load = [], prepare_wan_data.load_pipeline

    def load_and_watch(*args):
        pipe = load(*args)
        assert pipe.transformer is None
        modules.extend(weakref.ref(module) for module in (pipe.vae, pipe.text_encoder))
        return pipe

    monkeypatch.setattr(prepare_wan_data, "load_pipeline", load_and_watch)
    prepare(wan_models / "t2v", clips, tmp_path)
    assert [module() for module in modules] == [None, None]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num-frames", "8"], "--num-frames: expected a multiple of 4 plus 1, got 8"),
        (["--num-frames", "-3"], "--num-frames: expected a multiple of 4 plus 1, got -3"),
        (["--resolutions", "32x40"], "--resolutions: expected multiples of 16, got 32x40"),
        (["--resolutions", "0x32"], "--resolutions: expected multiples of 16, got 0x32"),
        (["--fps", "0"], "--fps: expected a positive number, got 0"),
        (["--input", "nowhere"], "--input: there is no folder nowhere"),
        (["--model", "./nowhere"], "--model: expected a folder or Hub name of a Diffusers pipeline, got ./nowhere"),
    ],
)
def test_wrong_arguments(wan_models, clips, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        prepare(wan_models / "t2v", clips, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "expected one of WanPipeline, WanImageToVideoPipeline, got .*StableDiffusion",
        ),
        ({"_class_name": "WanImageToVideoPipeline", "expand_timesteps": True}, "expand_timesteps.*; give it as a WanPipeline"),
    ],
)
def test_pipelines_that_cannot_be_used(clips, tmp_path, changes, message):
    (tmp_path / "model_index.json").write_text(json.dumps(changes), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, clips, tmp_path / "out")


def test_having_no_usable_clip_is_an_error(wan_models, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(b"no video")
    (tmp_path / "in/a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="none of the 1 clips in .* can be used"):
        prepare(wan_models / "t2v", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
