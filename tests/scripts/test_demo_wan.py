"""The demo for video: the recipe reads the clips that it makes up."""

import torch

from qat_recipes.data.video import VideoSettings, load_clips
from scripts import demo_wan


def test_the_recipe_reads_the_clips_of_the_demo(tmp_path, monkeypatch):
    def frames(name, count, size, fps):
        return torch.randint(256, (count, *size, 3), dtype=torch.uint8)

    monkeypatch.setattr(demo_wan, "DATA", tmp_path)
    monkeypatch.setattr(demo_wan, "read_packaged_clip", frames)
    demo_wan.prepare_clips()
    train, held_out = load_clips(VideoSettings(train=str(tmp_path / "train"), eval=str(tmp_path / "eval")))
    assert len(train) == 17 * len(demo_wan.CLIPS) and len(held_out) == 5 * len(demo_wan.CLIPS)
    for clips in (train, held_out):
        for clip, about in zip(clips, clips.clips, strict=True):
            assert [*clip["latents"].shape] == about["shapes"]["latents"] == [48, demo_wan.WINDOW, 8, 12]
            assert clip["prompt_embeds"].shape == (demo_wan.TEXT_LENGTH, demo_wan.TEXT_DIM)
    # Nothing that is held out was trained on.
    assert max(int(each["file"][-14:-12]) for each in train.clips) + demo_wan.WINDOW <= demo_wan.TRAIN_FRAMES


def test_the_picture_says_how_far_each_row_is_from_the_first(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_ylabel", lambda axes, label, **style: drawn.append(label))
    videos = {name: torch.rand(len(demo_wan.CLIPS), 4, 8, 12, 3) for name in ("original", "4-bit, trained")}
    demo_wan.draw(videos, {"4-bit, trained": 42.51}, tmp_path / "frames.png")
    assert drawn == ["original", "4-bit, trained\n42.5 dB"]
    assert (tmp_path / "frames.png").read_bytes().startswith(b"\x89PNG")
