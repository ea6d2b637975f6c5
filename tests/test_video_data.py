"""Videos to latents (scripts/prepare_wan_data.py, wan_clips.py) and back as batches (recipes/video_data.py)."""

import csv
import json
import math
import os
import struct
import subprocess
import sys
import time
import weakref
from collections import Counter
from itertools import chain, pairwise
from pathlib import Path

import av
import numpy
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors.torch import load_file, safe_open
from torch.utils.data import DataLoader

import prepare_wan_data
from tiny_wan import tiny_pipeline
from video_data import BucketBatches, EncodedClips, VideoSettings, load_clips
from wan_clips import UnusableClip, list_clips, read_clip

WIDE, TALL = (32, 48), (48, 32)
CAPTIONS = {"wide.mp4": "a red square moves right", "tall.mp4": "a square moves down", "sub/long.mkv": "a red square over black"}
REASONS = {
    "broken.mp4": "cannot be decoded: Invalid data found",
    "damaged.mp4": "damaged: a frame could be decoded only in part",
    "short.mp4": "too short: 4 frames at 16 fps, and at least 5 are needed",
    "silent.mp4": "no caption",
    "sound.mp4": "no video",
}


def write_video(path, frames, fps=16):
    """Encode frames, uint8 [height, width, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps, bit_rate=4_000_000)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def moving_square(count, height, width):
    frames = numpy.zeros((count, height, width, 3), numpy.uint8)
    for number, frame in enumerate(frames):
        frame[8:24, 2 * number : 2 * number + 16] = (240, 60, 20)
    return frames


def decoded(path):
    """All frames as PIL images, by the shortest way there is."""
    with av.open(str(path)) as container:
        return [frame.to_image() for frame in container.decode(video=0)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "t2v")
    tiny_pipeline(i2v=True).save_pretrained(folder / "i2v")
    tiny_pipeline(seed=1).save_pretrained(folder / "other")
    return folder


def make_clips(folder):
    """Three clips that can be used and five that cannot."""
    write_video(folder / "wide.mp4", moving_square(7, 32, 48))
    write_video(folder / "tall.mp4", moving_square(8, 100, 60))
    write_video(folder / "sub/long.mkv", moving_square(40, 64, 100), fps=24)
    for source, caption in CAPTIONS.items():
        (folder / source).with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    for source in REASONS:
        (folder / source).with_suffix(".txt").write_text("a square", encoding="utf-8")
    write_video(folder / "short.mp4", moving_square(4, 32, 48))
    write_video(folder / "silent.mp4", moving_square(9, 32, 48))
    (folder / "silent.txt").unlink()
    (folder / "broken.mp4").write_bytes(b"no video")
    # Noise, so that there are bytes enough of each frame to damage.
    write_video(folder / "damaged.mp4", list(numpy.random.default_rng(0).integers(0, 255, (5, 64, 96, 3), numpy.uint8)))
    damaged = bytearray((folder / "damaged.mp4").read_bytes())
    damaged[len(damaged) // 2 : len(damaged) // 2 + 200] = bytes(200)
    (folder / "damaged.mp4").write_bytes(damaged)
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(numpy.zeros((1, 1024), numpy.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return folder


def arguments(model, clips, output, *more):
    paths = ["--model", str(model), "--input", str(clips), "--output", str(output)]
    return [*paths, "--resolutions", "32x48", "48x32", "--num-frames", "9", "5", "--dtype", "float32", "--device", "cpu", *more]


def prepare(model, clips, output, *more):
    prepare_wan_data.main(arguments(model, clips, output, "--workers", "0", *more))
    return json.loads((output / "index.json").read_text(encoding="utf-8"))


@pytest.fixture
def encoded(monkeypatch):
    """The captions of the clips that get encoded."""
    captions, encode = [], prepare_wan_data.encode
    monkeypatch.setattr(prepare_wan_data, "encode", lambda *a: captions.append(a[2]) or encode(*a))
    return captions


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def prepared(models, clips, tmp_path_factory):
    """The output folder of a run on the clips; not to be changed."""
    output = tmp_path_factory.mktemp("prepared")
    prepare(models / "t2v", clips, output)
    return output


def test_index_lists_the_clips_and_why_others_are_left_out(models, clips, tmp_path, capsys):
    index = prepare(models / "t2v", clips, tmp_path)
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
    assert contents(tmp_path).keys() == files | {"index.json"}


def test_files_describe_themselves(prepared):
    index = json.loads((prepared / "index.json").read_text(encoding="utf-8"))
    for clip in index["clips"]:
        with safe_open(prepared / clip["file"], framework="pt") as tensors:
            metadata = json.loads(tensors.metadata()["clip"])
        shapes = {name: list(tensor.shape) for name, tensor in load_file(prepared / clip["file"]).items()}
        assert metadata | {"file": clip["file"], "shapes": shapes} == clip | {"settings": index["settings"]}


@torch.no_grad()
def test_the_pipeline_decodes_the_latents_to_what_the_vae_makes_of_the_video(models, clips, prepared, monkeypatch):
    pipe = WanPipeline.from_pretrained(models / "t2v")
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
def test_text_is_stored_short_and_read_back_as_the_pipeline_encodes_it(models, prepared):
    pipe = WanPipeline.from_pretrained(models / "t2v")
    dataset = EncodedClips(prepared)
    for clip, tensors in zip(dataset.clips, dataset, strict=True):
        expected, _ = pipe.encode_prompt(clip["caption"], do_classifier_free_guidance=False, max_sequence_length=512)
        assert torch.equal(tensors["prompt_embeds"], expected[0])
        assert clip["shapes"]["prompt_embeds"] == [len(clip["caption"].split()), 32]
        assert list(tensors["latents"].shape) == clip["shapes"]["latents"]


def test_captions_that_are_cut_are_counted(models, tmp_path, capsys):
    write_video(tmp_path / "in/clip.mp4", moving_square(5, 32, 48))
    (tmp_path / "in/clip.txt").write_text("a " * 600, encoding="utf-8")
    index = prepare(models / "t2v", tmp_path / "in", tmp_path / "out")
    assert index["clips"][0]["shapes"]["prompt_embeds"] == [512, 32]
    assert "1 captions fill all 512 tokens" in capsys.readouterr().out


@torch.no_grad()
def test_image_to_video_stores_what_the_pipeline_conditions_on(models, clips, tmp_path):
    index = prepare(models / "i2v", clips, tmp_path)
    assert index["settings"]["pipeline"] == "WanImageToVideoPipeline"
    tensors = EncodedClips(tmp_path)[[clip["source"] for clip in index["clips"]].index("wide.mp4")]
    pipe = WanImageToVideoPipeline.from_pretrained(models / "i2v")
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


def test_bfloat16_is_stored_and_comes_from_the_same_float32_latents(models, clips, prepared, tmp_path):
    prepare(models / "t2v", clips, tmp_path, "--dtype", "bfloat16")
    for exact, rounded in zip(EncodedClips(prepared), EncodedClips(tmp_path), strict=True):
        assert torch.equal(rounded["latents"], exact["latents"].bfloat16())
        assert rounded["prompt_embeds"].dtype == torch.bfloat16
    pipe = prepare_wan_data.load_pipeline(str(models / "i2v"), torch.bfloat16, "cpu")
    types = pipe.text_encoder.dtype, pipe.vae.dtype, pipe.image_encoder.dtype
    assert types == (torch.bfloat16, torch.float32, torch.float32)


# What a clip is made of -----------------------------------------------------------------------------------------------


def test_clips_are_resampled_by_their_timestamps(tmp_path):
    write_video(tmp_path / "gray.mp4", [numpy.full((32, 32, 3), 10 * number, numpy.uint8) for number in range(24)], fps=32)
    for fps, numbers in (
        (32, [0, 1, 2, 3, 4]),
        (16, [0, 2, 4, 6, 8]),
        (8, [0, 4, 8, 12, 16]),
        (24, [0, 1, 2, 4, 5]),
        (64, [0, 0, 1, 1, 2]),
    ):
        frames = read_clip(tmp_path / "gray.mp4", num_frames=[5], resolutions=[(32, 32)], fps=fps)
        assert frames.dtype == torch.uint8
        # Compression costs a few levels.
        assert (frames.float().mean((1, 2, 3)) - 10 * torch.tensor(numbers)).abs().max() < 4, fps


@pytest.mark.parametrize(("shape", "expected"), [((32, 96), WIDE), ((34, 32), TALL), ((30, 32), WIDE), ((96, 32), TALL)])
def test_clips_go_to_the_nearest_aspect_ratio_and_keep_their_centre(tmp_path, shape, expected):
    height, width = shape
    frame = numpy.zeros((height, width, 3), numpy.uint8)
    # A white disc in the middle stays a disc in the middle.
    y, x = numpy.mgrid[:height, :width]
    frame[(y - height / 2 + 0.5) ** 2 + (x - width / 2 + 0.5) ** 2 < 10**2] = 255
    write_video(tmp_path / "disc.mp4", [frame] * 5)
    frames = read_clip(tmp_path / "disc.mp4", num_frames=[5], resolutions=[WIDE, TALL], fps=16)
    assert frames.shape == (5, *expected, 3)
    inside = (frames[0].float().mean(-1) > 127).nonzero().float()
    assert (inside.mean(0) - (torch.tensor(expected) - 1) / 2).abs().max() < 1
    extent = inside.amax(0) - inside.amin(0)
    assert (extent[0] - extent[1]).abs() <= 2


def test_turned_videos_are_turned(tmp_path):
    frame = moving_square(6, 48, 32)[5]
    write_video(tmp_path / "flat.mp4", [frame] * 5)
    data = (tmp_path / "flat.mp4").read_bytes()
    # The display matrix in the header of the track: identity, and a quarter turn clockwise.
    identity, turned = (
        struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
        struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, *[0] * 4, 1 << 30),
    )
    at = data.index(identity, data.index(b"tkhd"))
    (tmp_path / "turned.mp4").write_bytes(data[:at] + turned + data[at + len(identity) :])
    flat = read_clip(tmp_path / "flat.mp4", num_frames=[5], resolutions=[TALL], fps=16)
    upright = read_clip(tmp_path / "turned.mp4", num_frames=[5], resolutions=[WIDE], fps=16)
    assert torch.equal(upright, torch.rot90(flat, -1, (1, 2)))


def test_the_longest_length_that_fits_is_taken(tmp_path):
    write_video(tmp_path / "clip.mp4", moving_square(12, 32, 48))
    lengths = [
        read_clip(tmp_path / "clip.mp4", num_frames=n, resolutions=[WIDE], fps=16).shape[0] for n in ([5], [5, 9, 13], [13, 5])
    ]
    assert lengths == [5, 9, 5]
    with pytest.raises(UnusableClip, match="12 frames at 16 fps, and at least 13 are needed"):
        read_clip(tmp_path / "clip.mp4", num_frames=[17, 13], resolutions=[WIDE], fps=16)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_files_say_the_same_as_pairs(kind, clips, tmp_path):
    column = {"jsonl": "text", "csv": "caption"}[kind]
    rows = [{"file_name": source, column: text} for source, text in CAPTIONS.items()]
    rows += [{"file_name": "gone.mp4", column: "a"}, {"file_name": "silent.mp4", column: ""}]
    for path in clips.rglob("*.m*"):
        target = tmp_path / path.relative_to(clips)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    else:
        with (tmp_path / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    found, skipped = list_clips(tmp_path)
    assert found == [clip for clip in list_clips(clips)[0] if clip.source in CAPTIONS]
    assert len(found) == 3
    assert skipped == {"gone.mp4": "there is no such file", "silent.mp4": "it has no caption"}


# Going on -------------------------------------------------------------------------------------------------------------


def test_a_second_run_encodes_nothing_and_changes_nothing(models, clips, tmp_path, encoded):
    prepare(models / "t2v", clips, tmp_path)
    assert sorted(encoded) == sorted(CAPTIONS.values())
    before, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.safetensors")}
    encoded.clear()
    prepare(models / "t2v", clips, tmp_path)
    assert encoded == []
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_has_changed_is_encoded_again(models, tmp_path, encoded, capsys):
    clips, output = make_clips(tmp_path / "in"), tmp_path / "out"
    prepare(models / "t2v", clips, output)
    encoded.clear()
    (clips / "wide.txt").write_text("a blue square", encoding="utf-8")
    write_video(clips / "tall.mp4", moving_square(9, 100, 60))
    (clips / "sub/long.mkv").unlink()
    write_video(clips / "new.mp4", moving_square(5, 32, 48))
    (clips / "new.txt").write_text("a new square", encoding="utf-8")
    index = prepare(models / "t2v", clips, output)
    assert sorted(encoded) == ["a blue square", "a new square", CAPTIONS["tall.mp4"]]
    assert {c["source"]: (c["frames"], c["caption"]) for c in index["clips"]} == {
        "new.mp4": (5, "a new square"),
        "tall.mp4": (9, CAPTIONS["tall.mp4"]),
        "wide.mp4": (5, "a blue square"),
    }
    assert "1 older files are not of clips in this input" in capsys.readouterr().out
    # A damaged file counts as none.
    encoded.clear()
    file = output / "clips/new.mp4.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-10])
    prepare(models / "t2v", clips, output)
    assert encoded == ["a new square"]
    assert file.read_bytes() == good


def test_a_failure_leaves_nothing_half_done_and_is_gone_on_from(models, clips, prepared, tmp_path, encoded, monkeypatch):
    save_file = prepare_wan_data.save_file

    def fail_at_the_second(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if len(encoded) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(prepare_wan_data, "save_file", fail_at_the_second)
        prepare(models / "t2v", clips, tmp_path)
    assert len(contents(tmp_path)) == 1
    prepare(models / "t2v", clips, tmp_path)
    assert len(encoded) == 4
    assert contents(tmp_path) == contents(prepared)


def test_a_killed_process_is_gone_on_from(models, tmp_path, encoded):
    clips, output, count = tmp_path / "in", tmp_path / "out", 12
    write_video(clips / "00.mp4", moving_square(5, 32, 48))
    for number in range(count):
        (clips / f"{number:02}.mp4").write_bytes((clips / "00.mp4").read_bytes())
        (clips / f"{number:02}.txt").write_text(f"a square {'slowly ' * number}", encoding="utf-8")
    command = [sys.executable, prepare_wan_data.__file__, *arguments(models / "t2v", clips, output, "--workers", "2")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 50
        while not list(output.rglob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
        log = process.stdout.read()
    done = contents(output)
    assert 1 <= sum(name.endswith(".safetensors") for name in done) < count, log
    assert "index.json" not in done
    index = prepare(models / "t2v", clips, output)
    finished = {name: content for name, content in done.items() if name.endswith(".safetensors")}
    assert len(encoded) == count - len(finished)
    assert len(index["clips"]) == count
    after = contents(output)
    assert finished.items() <= after.items()
    assert len(after) == count + 1


def test_other_settings_and_encoders_are_refused(models, clips, prepared, tmp_path, encoded):
    prepare(models / "t2v", clips, tmp_path)
    before = contents(tmp_path)
    encoded.clear()
    for model, more, what in (
        ("t2v", ["--fps", "8"], "fps was 16.0 and is 8.0"),
        ("t2v", ["--num-frames", "5"], r"num_frames was \[5, 9\] and is \[5\]"),
        ("t2v", ["--resolutions", "32x32"], r"resolutions was \[\[32, 48\], \[48, 32\]\] and is \[\[32, 32\]\]"),
        ("other", [], "vae was '[0-9a-f]{16}' and is '[0-9a-f]{16}'; text_encoder was"),
        ("i2v", [], "pipeline was 'WanPipeline' and is 'WanImageToVideoPipeline'; image_encoder was None"),
    ):
        with pytest.raises(ValueError, match=f"made with other settings: {what}.*; choose another folder"):
            prepare(models / model, clips, tmp_path, *more)
    assert encoded == []
    assert contents(tmp_path) == before


def test_fingerprints_see_weights_and_constants():
    vae, same, other = tiny_pipeline().vae, tiny_pipeline().vae, tiny_pipeline().vae
    next(other.parameters()).data[0, 0, 0, 0, 0] += 1e-3
    digests = [prepare_wan_data.fingerprint(module) for module in (vae, same, other)]
    assert digests[0] == digests[1] != digests[2]
    assert prepare_wan_data.fingerprint(vae, [1.0]) != prepare_wan_data.fingerprint(vae, [2.0])


def test_the_encoders_are_dropped(models, clips, tmp_path, monkeypatch):
    modules, load = [], prepare_wan_data.load_pipeline

    def load_and_watch(*args):
        pipe = load(*args)
        assert pipe.transformer is None
        modules.extend(weakref.ref(module) for module in (pipe.vae, pipe.text_encoder))
        return pipe

    monkeypatch.setattr(prepare_wan_data, "load_pipeline", load_and_watch)
    prepare(models / "t2v", clips, tmp_path)
    assert [module() for module in modules] == [None, None]


# Errors ---------------------------------------------------------------------------------------------------------------


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
def test_wrong_arguments(models, clips, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        prepare(models / "t2v", clips, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "StableDiffusionPipeline"},
            "expected one of WanPipeline, WanImageToVideoPipeline, got .*StableDiffusion",
        ),
        ({"_class_name": "WanImageToVideoPipeline", "expand_timesteps": True}, "expand_timesteps.*is not supported"),
    ],
)
def test_pipelines_that_cannot_be_used(clips, tmp_path, changes, message):
    (tmp_path / "model_index.json").write_text(json.dumps(changes), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path, clips, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.mp4"}', "row 1: expected file_name and either caption or text, got file_name"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "a", "caption": "b"}', "either caption or text"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "a"}\n{"file', 'row 2: .*, got {"file'),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": 3}', "row 1: expected text in file_name and text, got 'a.mp4' and 3"),
        ("metadata.jsonl", '{"file_name": "../a.mp4", "text": "a"}', "the name of a file in the folder, got '../a.mp4'"),
        ("metadata.jsonl", '{"file_name": "/a.mp4", "text": "a"}', "the name of a file in the folder, got '/a.mp4'"),
        ("metadata.jsonl", '{"file_name": "", "text": "a"}', "the name of a file in the folder, got ''"),
        ("metadata.csv", "file_name,caption\na.mp4,a\n./a.mp4,b\n", "row 2: ./a.mp4 occurs twice"),
        ("metadata.csv", "name,caption\na.mp4,a\n", "row 1: expected file_name and either caption or text, got name, caption"),
        ("metadata.csv", "file_name,caption\n", "there is no clip in"),
        ("notes.txt", "nothing", "there is no clip in"),
    ],
)
def test_wrong_metadata(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list_clips(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "metadata.csv"])
def test_text_of_another_encoding(tmp_path, name):
    (tmp_path / "a.mp4").touch()
    (tmp_path / name).write_text("file_name,caption\na.mp4,café\n", encoding="latin-1")
    with pytest.raises(ValueError, match=f"{name}: not UTF-8 text: .*0xe9"):
        list_clips(tmp_path)


def test_two_kinds_of_metadata(tmp_path):
    for name in ("metadata.csv", "metadata.jsonl"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds metadata.jsonl and metadata.csv; remove one"):
        list_clips(tmp_path)


def test_no_usable_clip_is_an_error(models, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes(b"no video")
    (tmp_path / "in/a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(ValueError, match="none of the 1 clips in .* can be used"):
        prepare(models / "t2v", tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The dataset ----------------------------------------------------------------------------------------------------------


def test_folders_that_are_no_data(prepared, tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*index.json; expected a folder that scripts/prepare_wan_data.py"):
        EncodedClips(tmp_path)
    index = json.loads((prepared / "index.json").read_text(encoding="utf-8"))
    for text, message in (
        ("{", "is damaged"),
        (json.dumps({"format_version": 1}), "is damaged"),
        (json.dumps(index | {"format_version": 2}), "has format_version 2, and this program reads 1"),
        (json.dumps(index), "3 files that .* lists are missing, clips/sub/long.mkv.safetensors for one"),
    ):
        (tmp_path / "index.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            EncodedClips(tmp_path)


def test_held_out_clips(models, clips, prepared, tmp_path):
    everything = [clip["source"] for clip in EncodedClips(prepared).clips]
    train, evaluation = load_clips(VideoSettings(train=str(prepared), eval_fraction=0.4))
    assert [[clip["source"] for clip in part.clips] for part in (train, evaluation)] == [everything[:2], everything[2:]]
    assert (len(train), len(evaluation), len(train.buckets), len(evaluation.buckets)) == (2, 1, 2, 1)
    assert load_clips(VideoSettings(train=str(prepared)))[1] is None
    with pytest.raises(ValueError, match="0.9 of 3 clips leaves none; give more clips"):
        load_clips(VideoSettings(train=str(prepared), eval_fraction=0.9))
    prepare(models / "t2v", clips, tmp_path / "same", "--num-frames", "5")
    assert len(load_clips(VideoSettings(train=str(prepared), eval=str(tmp_path / "same")))[1]) == 3
    prepare(models / "other", clips, tmp_path / "other")
    with pytest.raises(ValueError, match="were made with different vae, text_encoder; prepare both with the same model"):
        load_clips(VideoSettings(train=str(prepared), eval=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval": "b", "eval_fraction": 0.1}, "eval and eval_fraction are both set"),
        ({"eval_fraction": 1.0}, "data.eval_fraction: expected a number between 0 and 1, got 1.0"),
        ({"eval": "./a"}, "data.eval: a holds the clips to train on too"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        VideoSettings(train="a", **settings)
    assert not VideoSettings(train="a").has_eval
    assert VideoSettings(train="a", eval="b").has_eval


# Batches --------------------------------------------------------------------------------------------------------------

BUCKETS = ["wide"] * 11 + ["tall"] * 5 + ["long"] * 2 + ["wide"] * 2


def batches(start, stop, seed=3, size=4):
    return list(BucketBatches(BUCKETS, size, seed, start, stop))


def test_an_epoch_has_every_clip_in_full_batches_of_one_bucket():
    an_epoch = BucketBatches(BUCKETS, 4, 3, 0, 1).batches_an_epoch
    assert an_epoch == math.ceil(13 / 4) + math.ceil(5 / 4) + 1
    for epoch in range(3):
        of_epoch = batches(epoch * an_epoch, (epoch + 1) * an_epoch)
        assert all(len(batch) == 4 and len({BUCKETS[index] for index in batch}) == 1 for batch in of_epoch)
        seen = Counter(chain(*of_epoch))
        assert seen.keys() == set(range(len(BUCKETS)))
        # Filling up: 3 of the 13 wide clips, 3 of the 5 tall ones, both long ones.
        repeated = Counter(BUCKETS[index] for index, times in seen.items() if times == 2)
        assert repeated == {"wide": 3, "tall": 3, "long": 2}
        assert max(seen.values()) == 2


def test_order_follows_from_the_seed_and_changes_with_the_epoch():
    an_epoch = BucketBatches(BUCKETS, 4, 3, 0, 1).batches_an_epoch
    run = batches(0, 3 * an_epoch)
    state = torch.get_rng_state()
    assert batches(0, 3 * an_epoch) == run
    assert torch.equal(torch.get_rng_state(), state)
    assert batches(0, 3 * an_epoch, seed=4) != run
    assert run[:an_epoch] != run[an_epoch : 2 * an_epoch]
    # The buckets are mixed, not one after the other.
    changes = [sum(BUCKETS[one[0]] != BUCKETS[two[0]] for one, two in pairwise(run[e * an_epoch :][:an_epoch])) for e in range(3)]
    assert max(changes) > len(set(BUCKETS)) - 1


@pytest.mark.parametrize("start", [1, 6, 7, 8, 20])
def test_a_resumed_run_goes_on_in_the_same_order(start):
    assert batches(start, 24) == batches(0, 24)[start:]
    assert len(BucketBatches(BUCKETS, 4, 3, start, 24)) == 24 - start


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return len(BUCKETS)

    def __getitem__(self, index):
        return index


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 12])
def test_processes_take_batches_in_turn(processes, start):
    """As Accelerate shards a loader, with each of its settings."""
    expected = batches(start, 24)
    for even_batches in (True, False):
        for use_seedable_sampler in (True, False):
            shards = []
            for process in range(processes):
                loader = DataLoader(Numbers(), batch_sampler=BucketBatches(BUCKETS, 4, 3, start, 24), generator=torch.Generator())
                loader = prepare_data_loader(
                    loader,
                    num_processes=processes,
                    process_index=process,
                    even_batches=even_batches,
                    use_seedable_sampler=use_seedable_sampler,
                )
                assert len(loader) == (24 - start) // processes
                shards.append([batch.tolist() for batch in loader])
            assert [list(batch) for batch in chain(*zip(*shards, strict=True))] == expected


def test_a_rest_that_does_not_reach_all_processes_is_dropped():
    shards = []
    for process in range(3):
        loader = DataLoader(Numbers(), batch_sampler=BucketBatches(BUCKETS, 4, 3, 0, 8))
        shards.append([b.tolist() for b in prepare_data_loader(loader, num_processes=3, process_index=process)])
    assert list(chain(*zip(*shards, strict=True))) == batches(0, 6)


def test_clips_collate_to_batches(prepared):
    dataset = EncodedClips(prepared)
    loader = DataLoader(dataset, batch_sampler=BucketBatches(dataset.buckets, 2, 0, 0, 3))
    shapes = sorted((tuple(batch["latents"].shape), tuple(batch["prompt_embeds"].shape)) for batch in loader)
    assert shapes == [((2, *bucket), (2, 512, 32)) for bucket in sorted(dataset.buckets)]
