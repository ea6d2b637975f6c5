"""What each step is given of clips with several windows and captions, repeats and dropped captions: it follows from the seed."""

import json
from collections import Counter
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file, save_file

import finetune_wan
from qat_patch.commands.clip_index import EMPTY_CAPTION, write_index
from qat_recipes.data.video import BucketBatches, Draw, DrawnBatches, EncodedClips, VideoSettings, load_clips, places_of
from support.models.tiny_clips import write_clips
from support.models.tiny_wan import TEXT_DIM, tiny_pipeline
from support.runs.runs import assert_same_run, run, run_until_killed

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four sources: a video in three windows, one with three captions, an image of one frame, and another video."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 6)
    index = json.loads((folder / "index.json").read_text())
    sources = ["a.mp4", "a.mp4", "b.mp4", "a.mp4", "images/c.png", "d.mp4"]
    clips = [clip | {"source": source} for clip, source in zip(index["clips"], sources, strict=True)]
    # One video, one shape: the third of the made-up clips is tall, and so is the last.
    clips.sort(key=lambda clip: clip["source"])
    for number, clip in enumerate(clips):
        tensors = load_file(folder / clip["file"])
        if clip["source"] == "b.mp4":
            tensors |= {f"prompt_embeds.{n}": torch.full((2, TEXT_DIM), float(n)).bfloat16() for n in (1, 2)}
            clip["variants"] = ["one", "two"]
        if clip["source"] == "images/c.png":
            tensors["latents"] = tensors["latents"][:, :1].contiguous()
        tensors["latents"][0, 0, 0, 0] = number
        clip["shapes"] = {name: list(x.shape) for name, x in tensors.items()}
        save_file(tensors, folder / clip["file"])
    save_file({"prompt_embeds": torch.full((1, TEXT_DIM), -7.0).bfloat16()}, folder / EMPTY_CAPTION)
    write_index(folder, index["settings"], clips, {}, empty_caption=True)
    return folder


def drawn(clips, settings, start, stop, seed=0):
    places = places_of(clips, settings)
    buckets = [clips.buckets[indices[0]] for indices in places]
    return list(DrawnBatches(places, buckets, batch_size=1, seed=seed, start=start, stop=stop))


def sources_in(clips, batches):
    return Counter(clips.clips[index]["source"] for index in chain(*batches))


def test_what_an_epoch_consists_of(folder):
    clips = EncodedClips(folder)
    settings = VideoSettings(train=str(folder))
    assert sources_in(clips, drawn(clips, settings, 0, 6)) == {"a.mp4": 3, "b.mp4": 1, "images/c.png": 1, "d.mp4": 1}
    settings = VideoSettings(train=str(folder), repeats={"images/*": 4, "[ad].mp4": 2})
    assert sources_in(clips, drawn(clips, settings, 0, 13)) == {"a.mp4": 6, "b.mp4": 1, "images/c.png": 4, "d.mp4": 2}
    settings = VideoSettings(train=str(folder), windows="random", repeats={"a.mp4": 2})
    assert sources_in(clips, drawn(clips, settings, 0, 5)) == {"a.mp4": 2, "b.mp4": 1, "images/c.png": 1, "d.mp4": 1}
    windows = Counter(
        int(index) for index in chain(*drawn(clips, settings, 0, 5 * 30)) if clips.clips[index]["source"] == "a.mp4"
    )
    assert len(windows) == 3 and sum(windows.values()) == 60 and min(windows.values()) > 9


def test_draws_follow_from_the_seed_and_go_on(folder):
    clips, settings = EncodedClips(folder), VideoSettings(train=str(folder), windows="random")
    whole = drawn(clips, settings, 0, 24)
    assert drawn(clips, settings, 7, 24) == whole[7:]
    assert drawn(clips, settings, 0, 24, seed=1) != whole
    assert [draw.number for draw in chain(*whole)] == list(range(24))
    # Without anything to draw the order is that of runs before there was.
    plain = drawn(clips, VideoSettings(train=str(folder)), 3, 20)
    assert [[int(index) for index in batch] for batch in plain] == list(BucketBatches(clips.buckets, 1, 0, 3, 20))


def test_captions_are_drawn(folder):
    clips = EncodedClips(folder, caption_dropout=0.25, seed=3)
    number = [clip["source"] for clip in clips.clips].index("b.mp4")
    first, known = clips[number]["prompt_embeds"], {-7.0: "empty", 1.0: "one", 2.0: "two"}
    taken = Counter()
    for step in range(400):
        embeds = clips[Draw(number, step)]["prompt_embeds"]
        assert embeds.shape == (512, TEXT_DIM) and clips[Draw(number, step)].keys() == {"latents", "prompt_embeds"}
        assert torch.equal(embeds, clips[Draw(number, step)]["prompt_embeds"])
        taken["first" if torch.equal(embeds, first) else known[embeds[0, 0].item()]] += 1
    assert abs(taken["empty"] - 100) < 30 and all(abs(taken[name] - 100) < 30 for name in ("first", "one", "two"))
    other = EncodedClips(folder, caption_dropout=0.25, seed=4)
    assert any(
        not torch.equal(clips[Draw(number, n)]["prompt_embeds"], other[Draw(number, n)]["prompt_embeds"]) for n in range(8)
    )
    # Without a number, as held-out clips are read, it is the first one.
    assert all(torch.equal(other[number]["prompt_embeds"], first) for _ in range(8))


def test_all_windows_of_a_video_are_held_out(folder):
    train, held_out = load_clips(VideoSettings(train=str(folder), eval_fraction=0.75))
    assert {clip["source"] for clip in train.clips} == {"a.mp4"} and len(train) == 3
    assert {clip["source"] for clip in held_out.clips} == {"b.mp4", "images/c.png", "d.mp4"}


def test_what_has_no_effect_is_refused(folder, tmp_path):
    clips = EncodedClips(folder)
    with pytest.raises(ValueError, match=r"data.repeats: no clip in .* is called \*.gif"):
        places_of(clips, VideoSettings(train=str(folder), repeats={"*.gif": 2}))
    with pytest.raises(ValueError, match=r"is called b\.mp4, or an earlier pattern has it"):
        places_of(clips, VideoSettings(train=str(folder), repeats={"*": 2, "b.mp4": 3}))
    with pytest.raises(ValueError, match=r"data.repeats\['\*'\]: expected at least 1, got 0"):
        VideoSettings(train="a", repeats={"*": 0})
    with pytest.raises(ValueError, match=r"data.caption_dropout: expected a number in \[0, 1\), got 1"):
        VideoSettings(train="a", caption_dropout=1.0)
    write_clips(tmp_path, 3)
    with pytest.raises(ValueError, match="data.windows: random has no effect"):
        places_of(EncodedClips(tmp_path), VideoSettings(train="a", windows="random"))
    with pytest.raises(ValueError, match="data.caption_dropout: .* has no empty_caption.safetensors; run qat-patch prepare"):
        EncodedClips(tmp_path, caption_dropout=0.1)


def test_the_fingerprint_knows_the_empty_caption_where_it_is_used(folder, tmp_path):
    for name in ("index.json", EMPTY_CAPTION):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "clips").symlink_to(folder / "clips")
    before = EncodedClips(tmp_path).fingerprint, EncodedClips(tmp_path, caption_dropout=0.5).fingerprint
    save_file({"prompt_embeds": torch.full((1, TEXT_DIM), 7.0).bfloat16()}, tmp_path / EMPTY_CAPTION)
    index = json.loads((tmp_path / "index.json").read_text())
    write_index(tmp_path, index["settings"], index["clips"], {}, empty_caption=True)
    after = EncodedClips(tmp_path).fingerprint, EncodedClips(tmp_path, caption_dropout=0.5).fingerprint
    assert before[0] == after[0] and before[1] != after[1]
    (tmp_path / EMPTY_CAPTION).write_bytes((folder / EMPTY_CAPTION).read_bytes())
    clips = EncodedClips(tmp_path, caption_dropout=0.999)
    with pytest.raises(ValueError, match="empty_caption.safetensors is damaged"):
        [clips[Draw(0, number)] for number in range(4)]


def test_a_killed_run_resumes_bit_for_bit(folder, tmp_path):
    tiny_pipeline(layers=1).save_pretrained(tmp_path / "model")
    values = {"model.path": tmp_path / "model", "data.train": folder, "steps": 6, "batch_size": 1, "learning_rate": 1e-3}
    values |= {"data.windows": "random", "data.caption_dropout": 0.5, "data.repeats": "{images/*: 2}", "checkpoint_every": 3}
    values |= {"lora.rank": 2, "lora.alpha": 2}
    run(finetune_wan, values | {"output_dir": tmp_path / "whole"})
    run_until_killed(finetune_wan, values | {"output_dir": tmp_path / "run"}, "checkpoint-6")
    run(finetune_wan, values | {"output_dir": tmp_path / "run", "resume": "latest"})
    assert_same_run(tmp_path / "run", tmp_path / "whole")
