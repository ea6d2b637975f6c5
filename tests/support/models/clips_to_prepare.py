"""Videos for qat-patch prepare-wan-data, good ones and bad ones, and its runs on them."""

import json

import av
import numpy

from qat_patch.commands import prepare_wan_data
from support.models.tiny_wan import tiny_pipeline

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


def save_models(folder):
    """Pipelines to encode with: t2v, i2v, and `other`, which differs from t2v in its weights."""
    tiny_pipeline().save_pretrained(folder / "t2v")
    tiny_pipeline(i2v=True).save_pretrained(folder / "i2v")
    tiny_pipeline(seed=1).save_pretrained(folder / "other")
    return folder


def arguments(model, clips, output, *more):
    paths = ["--model", str(model), "--input", str(clips), "--output", str(output)]
    return [*paths, "--resolutions", "32x48", "48x32", "--num-frames", "9", "5", "--dtype", "float32", "--device", "cpu", *more]


def prepare(model, clips, output, *more):
    prepare_wan_data.main(arguments(model, clips, output, "--workers", "0", *more))
    return json.loads((output / "index.json").read_text(encoding="utf-8"))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
