"""qat-patch prepare-wan-data run again: after changes, failures and kills, and what of other settings it refuses."""

import os
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy
import pytest

from qat_patch.checkpoint.lock import locked
from qat_patch.commands import prepare_wan_data
from support.models.clips_to_prepare import (
    CAPTIONS,
    WIDE,
    arguments,
    contents,
    make_clips,
    moving_square,
    prepare,
    write_video,
)


@pytest.fixture
def encoded(monkeypatch):
    """The captions of the clips that get encoded."""
    captions, encode = [], prepare_wan_data.encode
    monkeypatch.setattr(prepare_wan_data, "encode", lambda *a: captions.append(a[2]) or encode(*a))
    return captions


def test_a_second_run_encodes_nothing_and_changes_nothing(wan_models, clips, tmp_path, encoded):
    prepare(wan_models / "t2v", clips, tmp_path)
    assert sorted(encoded) == sorted(CAPTIONS.values())
    before, times = contents(tmp_path), {path: path.stat().st_mtime_ns for path in (tmp_path / "clips").rglob("*.safetensors")}
    encoded.clear()
    prepare(wan_models / "t2v", clips, tmp_path)
    assert encoded == []
    assert contents(tmp_path) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_what_has_changed_is_encoded_again(wan_models, tmp_path, encoded, capsys):
    clips, output = make_clips(tmp_path / "in"), tmp_path / "out"
    prepare(wan_models / "t2v", clips, output)
    encoded.clear()
    (clips / "wide.txt").write_text("a blue square", encoding="utf-8")
    write_video(clips / "tall.mp4", moving_square(9, 100, 60))
    (clips / "sub/long.mkv").unlink()
    write_video(clips / "new.mp4", moving_square(5, 32, 48))
    (clips / "new.txt").write_text("a new square", encoding="utf-8")
    index = prepare(wan_models / "t2v", clips, output)
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
    prepare(wan_models / "t2v", clips, output)
    assert encoded == ["a new square"]
    assert file.read_bytes() == good


def test_a_failure_leaves_nothing_half_done_and_can_be_continued(wan_models, clips, prepared, tmp_path, encoded, monkeypatch):
    save_file = prepare_wan_data.save_file

    def fail_at_the_second(tensors, path, metadata):
        save_file(tensors, path, metadata)
        if len(encoded) == 2:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(prepare_wan_data, "save_file", fail_at_the_second)
        prepare(wan_models / "t2v", clips, tmp_path)
    assert len(contents(tmp_path)) == 1
    prepare(wan_models / "t2v", clips, tmp_path)
    assert len(encoded) == 4
    assert contents(tmp_path) == contents(prepared)


def test_the_work_of_a_killed_process_is_continued(wan_models, tmp_path, encoded):
    clips, output, count = tmp_path / "in", tmp_path / "out", 12
    write_video(clips / "00.mp4", moving_square(5, 32, 48))
    for number in range(count):
        (clips / f"{number:02}.mp4").write_bytes((clips / "00.mp4").read_bytes())
        (clips / f"{number:02}.txt").write_text(f"a square {'slowly ' * number}", encoding="utf-8")
    command = [sys.executable, "-m", "qat_patch", "prepare-wan-data"]
    command += arguments(wan_models / "t2v", clips, output, "--workers", "2")
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
    index = prepare(wan_models / "t2v", clips, output)
    finished = {name: content for name, content in done.items() if name.endswith(".safetensors")}
    assert len(encoded) == count - len(finished)
    assert len(index["clips"]) == count
    after = contents(output)
    assert finished.items() <= after.items()
    assert after.keys() - {name for name in after if name.startswith("clips/")} == {"index.json", "empty_caption.safetensors"}
    assert len(after) == count + 2


def test_other_settings_and_encoders_are_refused(wan_models, clips, prepared, tmp_path, encoded):
    prepare(wan_models / "t2v", clips, tmp_path)
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
            prepare(wan_models / model, clips, tmp_path, *more)
    assert encoded == []
    assert contents(tmp_path) == before


def test_a_video_of_the_same_size_is_another_one(wan_models, tmp_path, encoded):
    clips, output = tmp_path / "in", tmp_path / "out"
    clips.mkdir()
    for level in (20, 200):
        with av.open(str(clips / "a.avi"), "w") as container:
            stream = container.add_stream("rawvideo", rate=16)
            (stream.height, stream.width), stream.pix_fmt = WIDE, "yuv420p"
            for _ in range(5):
                picture = numpy.full((*WIDE, 3), level, numpy.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        os.utime(clips / "a.avi", (10**9, 10**9))
        (clips / "a.txt").write_text("a square", encoding="utf-8")
        prepare(wan_models / "t2v", clips, output)
    assert encoded == ["a square"] * 2


def test_two_at_once_and_what_a_killed_one_left(wan_models, clips, prepared, tmp_path):
    # What a process leaves that is killed while it writes.
    (tmp_path / "clips/sub").mkdir(parents=True)
    (tmp_path / "clips/sub/long.mkv.safetensors.incomplete").write_bytes(b"half")
    (tmp_path / ".lock").write_text('{"host": "here", "pid": 1}', encoding="utf-8")
    before = contents(tmp_path)
    with locked(tmp_path, "--output"), pytest.raises(ValueError, match=f"--output: .* is in use by process {os.getpid()} on"):
        prepare(wan_models / "t2v", clips, tmp_path)
    assert contents(tmp_path).keys() == before.keys() - {".lock"}
    prepare(wan_models / "t2v", clips, tmp_path)
    assert contents(tmp_path) == contents(prepared)
