"""qat-patch prepare-wan-data with images, windows and several captions, tables of other trainers, and what is added later."""

import json

import av
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from qat_patch.commands import encoded_clips, prepare_wan_data
from qat_patch.commands.clip_captions import list_clips
from qat_patch.commands.wan_clips import UnusableClip, read_clip, read_windows, spread
from qat_recipes.data.video import EncodedClips
from support.models.clips_to_prepare import TALL, WIDE, moving_square, prepare, write_video

SIZES = [WIDE, TALL]


def picture(height, width):
    image = numpy.zeros((height, width, 3), numpy.uint8)
    image[: height // 2, : width // 2] = (240, 60, 20)
    return Image.fromarray(image)


def encoding(monkeypatch):
    """What gets encoded: captions and numbers of frames."""
    done, encode = [], prepare_wan_data.encode
    monkeypatch.setattr(
        prepare_wan_data,
        "encode",
        lambda pipe, frames, *a: done.append((a[0], tuple(frames.shape[:3]))) or encode(pipe, frames, *a),
    )
    return done


@pytest.fixture
def mixed(tmp_path):
    """A video of 21 frames, a wide image, a tall one, and a cover without a text."""
    folder = tmp_path / "in"
    write_video(folder / "video.mp4", moving_square(21, 32, 48))
    picture(64, 96).save(folder / "wide.png")
    picture(60, 40).save(folder / "tall.jpg")
    picture(60, 40).save(folder / "cover.jpg")
    for name, text in (("video", "a red square moves right"), ("wide", "a red square"), ("tall", "a square")):
        (folder / f"{name}.txt").write_text(text)
    return folder


# Images ---------------------------------------------------------------------------------------------------------------


def test_images_are_clips_of_one_frame(wan_models, mixed, tmp_path):
    index = prepare(wan_models / "t2v", mixed, tmp_path / "out")
    assert {clip["source"]: clip["shapes"]["latents"] for clip in index["clips"]} == {
        "tall.jpg": [4, 1, 6, 4],
        "video.mp4": [4, 3, 4, 6],
        "wide.png": [4, 1, 4, 6],
    }
    assert index["skipped"] == {}
    data = EncodedClips(tmp_path / "out")
    assert len(set(data.buckets)) == 3
    pipe = prepare_wan_data.load_pipeline(str(wan_models / "t2v"), torch.float32, "cpu")
    frame = read_clip(mixed / "wide.png", num_frames=[9], resolutions=SIZES, fps=16)
    video = torch.zeros(9, 32, 48, 3, dtype=torch.uint8)
    video[:] = frame
    # The VAE encodes a first frame by itself.
    latents = prepare_wan_data.encode(pipe, video, "a", torch.float32)["latents"]
    torch.testing.assert_close(data[2]["latents"], latents[:, :1], rtol=1e-4, atol=1e-4)


def test_image_to_video_leaves_images_out(wan_models, mixed, tmp_path):
    index = prepare(wan_models / "i2v", mixed, tmp_path / "out")
    assert [clip["source"] for clip in index["clips"]] == ["video.mp4"]
    assert set(index["skipped"]) == {"tall.jpg", "wide.png"}
    assert all("image to video has nothing to learn from one" in reason for reason in index["skipped"].values())


def test_images_are_read_as_viewers_show_them(tmp_path):
    image = picture(64, 96)
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn clockwise
    image.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    (size,) = {read_windows(tmp_path / "turned.jpg", num_frames=[5], resolutions=SIZES, fps=16).source_size}
    assert size == (96, 64)
    frame = read_clip(tmp_path / "turned.jpg", num_frames=[5], resolutions=SIZES, fps=16)
    assert frame.shape == (1, *TALL, 3)
    assert frame[0, 8, -8, 0] > 200 > 50 > frame[0, 8, 8, 0]
    image.convert("RGBA").save(tmp_path / "opaque.png")
    assert read_clip(tmp_path / "opaque.png", num_frames=[5], resolutions=SIZES, fps=16).shape == (1, *WIDE, 3)
    image.putalpha(Image.new("L", image.size, 254))
    image.save(tmp_path / "glass.png")
    picture(8, 8).save(tmp_path / "film.webp", save_all=True, append_images=[picture(8, 10).resize((8, 8))])
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name, reason in (
        ("glass.png", "transparent in parts"),
        ("film.webp", "it is an animation"),
        ("broken.png", "cannot be decoded"),
    ):
        with pytest.raises(UnusableClip, match=reason):
            read_clip(tmp_path / name, num_frames=[5], resolutions=SIZES, fps=16)


def test_a_text_beside_a_video_is_not_the_caption_of_its_cover(tmp_path):
    for name in ("a.MP4", "a.jpg", "a.txt"):
        (tmp_path / name).write_text("a")
    clips, skipped = list_clips(tmp_path)
    assert [clip.source for clip in clips] == ["a.MP4"] and skipped == {"a.jpg": "the caption is that of a.MP4"}


# Windows --------------------------------------------------------------------------------------------------------------


def test_windows_are_spread_over_the_video(wan_models, mixed, tmp_path):
    index = prepare(wan_models / "t2v", mixed, tmp_path / "out", "--windows", "3")
    windows = {clip["file"]: clip.get("start", 0) for clip in index["clips"] if clip["source"] == "video.mp4"}
    assert windows == {f"clips/video.mp4{x}.safetensors": start for x, start in (("", 0), (".6", 6), (".12", 12))}
    with av.open(str(mixed / "video.mp4")) as container:
        frames = torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])
    read = read_windows(mixed / "video.mp4", num_frames=[9, 5], resolutions=SIZES, fps=16, windows=3)
    assert read.starts == [0, 6, 12] and read.source_frames == 21
    assert all(torch.equal(one, frames[start : start + 9]) for one, start in zip(read.frames, read.starts, strict=True))
    latents = [load_file(tmp_path / "out" / file)["latents"] for file in windows]
    assert not torch.allclose(latents[0], latents[1]) and not torch.allclose(latents[1], latents[2])


def test_windows_of_short_videos():
    assert spread(9, 9, 3) == [0]
    assert spread(10, 9, 3) == [0, 1]
    assert spread(100, 9, 1) == [0]
    assert spread(100, 10, 4) == [0, 30, 60, 90]


# What is added later --------------------------------------------------------------------------------------------------


def test_what_is_added_is_all_that_is_encoded(wan_models, mixed, tmp_path, monkeypatch):
    write_video(mixed / "other.mp4", moving_square(7, 48, 32))
    (mixed / "other.txt").write_text("a square slowly")
    done, out = encoding(monkeypatch), tmp_path / "out"

    def more(*options):
        done.clear()
        index = prepare(wan_models / "t2v", mixed, out, *options)
        return sorted(done), {clip["file"]: (clip["frames"], clip["height"], clip["width"]) for clip in index["clips"]}

    first, before = more()
    assert len(first) == 4
    # A length that one video fills: the others keep theirs, and are not even decoded again where they are known to.
    longer = ["--num-frames", "5", "9", "17"]
    assert more(*longer)[0] == [("a red square moves right", (17, *WIDE))]
    assert more(*longer)[0] == []
    # A resolution that suits one image.
    square = ["--resolutions", "32x48", "48x32", "64x48"]
    picture(64, 48).save(mixed / "nearly.png")
    (mixed / "nearly.txt").write_text("a blue square")
    assert more(*longer)[0] == [("a blue square", (1, *TALL))]
    assert more(*longer, *square)[0] == [("a blue square", (1, 64, 48))]
    # More windows: of each video those that are new.
    assert more(*longer, *square, "--windows", "2")[0] == [
        ("a red square moves right", (17, *WIDE)),
        ("a square slowly", (5, *TALL)),
    ]
    assert more(*longer, *square, "--windows", "2")[0] == []
    after = more(*longer, *square)
    assert after[0] == [] and {name: size for name, size in after[1].items() if name in before} == before | {
        "clips/video.mp4.safetensors": (17, *WIDE)
    }
    with pytest.raises(ValueError, match=r"num_frames was \[5, 9, 17\] and is \[5, 9\]"):
        more(*square)


def test_files_of_older_versions_are_looked_at_again(wan_models, mixed, tmp_path, monkeypatch):
    """They do not say how long their video is; what it would be encoded to is compared."""
    done, out, record = encoding(monkeypatch), tmp_path / "out", encoded_clips.record_of

    def older(*args):
        return {name: x for name, x in record(*args).items() if name not in ("source_frames", "source_size")}

    with monkeypatch.context() as patch:
        patch.setattr(prepare_wan_data, "record_of", older)
        prepare(wan_models / "t2v", mixed, out)
    for options in ([], ["--num-frames", "5", "9", "81"], ["--windows", "2", "--num-frames", "5", "9", "81"]):
        done.clear()
        prepare(wan_models / "t2v", mixed, out, *options)
        assert len(done) == ("--windows" in options)


# Captions -------------------------------------------------------------------------------------------------------------


def test_several_captions_are_stored(wan_models, mixed, tmp_path, monkeypatch):
    texts = ["a red square", "a square moves right"]
    rows = [{"file_name": "video.mp4", "captions": texts}, {"file_name": "wide.png", "captions": ["a square"]}]
    (mixed / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done, out = encoding(monkeypatch), tmp_path / "out"
    index = prepare(wan_models / "t2v", mixed, out)
    clip = index["clips"][0]
    assert (clip["caption"], clip["variants"]) == (texts[0], texts[1:])
    tensors = load_file(out / clip["file"])
    assert [len(tensors[name]) for name in ("prompt_embeds", "prompt_embeds.1")] == [3, 4]
    assert "variants" not in index["clips"][1]
    done.clear()
    rows[0]["captions"] = texts[:1]
    (mixed / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "variants" not in prepare(wan_models / "t2v", mixed, out)["clips"][0] and len(done) == 1
    for wrong in ([], ["a", 3], [["a"]]):
        rows[0]["captions"] = wrong
        (mixed / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if wrong:
            with pytest.raises(ValueError, match="row 1: expected text in file_name and captions"):
                list_clips(mixed)
        else:
            assert list_clips(mixed)[1] == {"video.mp4": "it has no caption"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "video,prompt\nvideo.mp4,a red square\n"),  # DiffSynth-Studio
        ("metadata.csv", "video,image,prompt\nvideo.mp4,,a red square\n,wide.png,a square\n"),
        ("metadata.jsonl", '{"video_path": "%s/video.mp4", "caption": "a red square"}'),  # musubi-tuner
        ("metadata.jsonl", '{"image_path": "%s/wide.png", "caption": "a square"}'),
        ("metadata.csv", "file_name,caption\nvideo.mp4,a red square\n"),  # finetrainers
    ],
)
def test_tables_of_other_trainers(mixed, capsys, name, text):
    (mixed / name).write_text(text.replace("%s", str(mixed.resolve())))
    clips, skipped = list_clips(mixed)
    expected = {"video.mp4": "a red square", "wide.png": "a square"}
    assert clips and skipped == {} and all(clip.caption == expected[clip.source] for clip in clips)
    assert len(clips) == text.count("a red square") + text.count("a square")
    assert "not used" not in capsys.readouterr().out
