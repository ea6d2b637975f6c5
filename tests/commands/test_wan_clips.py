"""Clips as commands/wan_clips.py finds them with their captions, and reads them: length, rate, size and turn."""

import csv
import hashlib
import json
import struct

import numpy
import pytest
import torch

from qat_patch.commands.clip_captions import list_clips
from qat_patch.commands.wan_clips import UnusableClip, read_clip
from support.models.clips_to_prepare import CAPTIONS, TALL, WIDE, moving_square, write_video


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


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "video,prompt\na.mp4,a cat, on a mat\n", r"row 1: .* got \[' on a mat'\] beyond them.* got 'a cat'"),
        ("metadata.csv", "video,prompt,prompt\na.mp4,a,b\n", "columns with different names, got video, prompt, prompt"),
        ("metadata.csv", 'video,prompt\na.mp4,"a\n', "after row 0: no CSV: unexpected end of data"),
        ("metadata.csv", "video,file_name,prompt\na.mp4,b.mp4,a\n", "one column of each kind"),
        ("metadata.csv", "video,text,prompt\na.mp4,b,a\n", "row 1: .*got video, text, prompt .*one column of each kind"),
        (
            "metadata.jsonl",
            '{"video": "a.mp4", "prompt": "a"}\n\n{"vidoe": "b.mp4", "prompt": "a"}',
            "row 3: .* got vidoe, prompt",
        ),
        ("metadata.jsonl", '{"video": "a.mp4", "prompt": ["a"]}', r"row 1: expected text in video and prompt, got .*\['a'\]"),
    ],
)
def test_tables_that_would_be_read_in_part(tmp_path, name, text, message):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list_clips(tmp_path)


@pytest.mark.parametrize("columns", [("video", "prompt"), ("file_name", "prompt"), ("video", "text")])
def test_other_names_of_columns(tmp_path, columns, capsys):
    (tmp_path / "a.mp4").write_bytes(b"video")
    for name, rows in (
        ("metadata.csv", f"{','.join(columns)},start\n" + 'a.mp4,"a cat, on a mat",3\n'),
        ("metadata.jsonl", json.dumps({columns[0]: "a.mp4", columns[1]: "a cat, on a mat", "start": 3})),
    ):
        (tmp_path / name).write_text(rows, encoding="utf-8")
        (clip,), skipped = list_clips(tmp_path)
        assert (clip.source, clip.caption, skipped) == ("a.mp4", "a cat, on a mat", {})
        assert clip.video_sha256 == hashlib.sha256(b"video").hexdigest()
        assert f"{name}: not used: start" in capsys.readouterr().out
        (tmp_path / name).unlink()


def test_captions_of_nothing_are_reported(tmp_path):
    for name in ("a.mp4", "a.txt", "b.mpeg", "b.txt"):
        (tmp_path / name).write_text("a")
    found, skipped = list_clips(tmp_path)
    assert [clip.source for clip in found] == ["a.mp4"]
    assert skipped == {"b.txt": "there is no video of this name (.avi, .m4v, .mkv, .mov, .mp4, .webm) and no image"}


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
