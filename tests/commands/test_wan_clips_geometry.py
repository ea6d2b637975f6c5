"""Videos as players show them: turned, mirrored, with pixels that are not square, behind a cover, at any rate."""

import struct
from fractions import Fraction

import av
import numpy
import pytest

from qat_patch.commands.wan_clips import UnusableClip, read_clip
from support.models.clips_to_prepare import TALL, WIDE, write_video

ONE = 1 << 16
COLORS = {"red": (230, 20, 20), "green": (20, 230, 20), "blue": (20, 20, 230), "white": (230, 230, 230)}


def corners_picture():
    """Red and green above blue and white."""
    frame = numpy.zeros((32, 48, 3), numpy.uint8)
    for (row, column), color in zip(((0, 0), (0, 24), (16, 0), (16, 24)), COLORS.values(), strict=True):
        frame[row : row + 16, column : column + 24] = color
    return frame


def corners(frames):
    """The names of the colours of the third frame, by rows."""
    _, height, width, _ = frames.shape
    picked = [frames[2, y, x].int().tolist() for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    distance = lambda name, color: sum(abs(a - b) for a, b in zip(COLORS[name], color, strict=True))  # noqa: E731
    return [min(COLORS, key=lambda name, color=color: distance(name, color)) for color in picked]


def read(path, *resolutions, count=5):
    return read_clip(path, num_frames=[count], resolutions=resolutions or [WIDE, TALL], fps=16)


def write_with_matrix(path, a, b, c, d):
    """A .mp4 whose track has this display matrix."""
    write_video(path, [corners_picture()] * 5)
    data = path.read_bytes()
    identity, matrix = (struct.pack(">9i", x[0], x[1], 0, x[2], x[3], 0, 0, 0, 1 << 30) for x in ((ONE, 0, 0, ONE), (a, b, c, d)))
    at = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(data[:at] + matrix + data[at + len(identity) :])


# Where x and y go: (x to x, x to y, y to x, y to y).
@pytest.mark.parametrize(
    ("matrix", "shape", "expected"),
    [
        ((1, 0, 0, 1), WIDE, "red green blue white"),
        ((-1, 0, 0, 1), WIDE, "green red white blue"),
        ((1, 0, 0, -1), WIDE, "blue white red green"),
        ((-1, 0, 0, -1), WIDE, "white blue green red"),
        ((0, 1, -1, 0), TALL, "blue red white green"),
        ((0, -1, 1, 0), TALL, "green white red blue"),
        ((0, 1, 1, 0), TALL, "red blue green white"),
        ((0, -1, -1, 0), TALL, "white green blue red"),
    ],
)
def test_every_turn_and_mirror_image(tmp_path, matrix, shape, expected):
    write_with_matrix(tmp_path / "a.mp4", *(ONE * x for x in matrix))
    frames = read(tmp_path / "a.mp4")
    assert frames.shape == (5, *shape, 3)
    assert corners(frames) == expected.split()


@pytest.mark.parametrize("matrix", [(46341, 46341, -46341, 46341), (ONE, 9000, 0, ONE)], ids=["45 degrees", "skewed"])
def test_other_matrices_are_reported(tmp_path, matrix):
    write_with_matrix(tmp_path / "a.mp4", *matrix)
    with pytest.raises(UnusableClip, match=r"a display matrix of \(1, 1, (-1|0), 1\): only quarter turns are known"):
        read(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(("pixel", "shape"), [("2/1", (32, 96)), ("1/3", (96, 48)), ("64/45", (32, 64))])
def test_pixels_that_are_not_square(tmp_path, suffix, pixel, shape):
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream("mpeg4", rate=16, bit_rate=4_000_000)
        stream.height, stream.width = WIDE
        stream.codec_context.sample_aspect_ratio = Fraction(pixel)
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(corners_picture(), format="rgb24")))
        container.mux(stream.encode())
    frames = read(tmp_path / f"a.{suffix}", WIDE, TALL, (32, 96), (96, 48), (32, 64))
    assert frames.shape == (5, *shape, 3)
    # Nothing was cropped.
    assert corners(frames) == list(COLORS)
    assert (frames[2, 4, 4].int() - frames[2, shape[0] // 2 - 6, shape[1] // 2 - 6].int()).abs().max() < 40


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("is_marked", [True, False])
def test_a_cover_in_front_is_no_video(tmp_path, suffix, is_marked):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        cover, stream = container.add_stream("mjpeg", rate=1), container.add_stream("mpeg4", rate=16, bit_rate=4_000_000)
        cover.height, cover.width, cover.pix_fmt = 64, 64, "yuvj420p"
        stream.height, stream.width = WIDE
        if is_marked:
            cover.disposition = av.stream.Disposition.attached_pic
        gray = av.VideoFrame.from_ndarray(numpy.full((64, 64, 3), 99, numpy.uint8), format="rgb24")
        container.mux(cover.encode(gray.reformat(format="yuvj420p")))
        container.mux(cover.encode())
        for _ in range(6):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(corners_picture(), format="rgb24")))
        container.mux(stream.encode())
    assert corners(read(path)) == list(COLORS)


def test_the_tag_of_old_programs(tmp_path):
    for tag, expected in (("90", "blue red white green"), ("-90", "green white red blue"), ("360", "red green blue white")):
        with av.open(str(tmp_path / "a.mkv"), "w") as container:
            stream = container.add_stream("mpeg4", rate=16, bit_rate=4_000_000)
            stream.height, stream.width = WIDE
            stream.metadata["rotate"] = tag
            for _ in range(6):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(corners_picture(), format="rgb24")))
            container.mux(stream.encode())
        assert corners(read(tmp_path / "a.mkv")) == expected.split()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_with_uneven_timestamps(tmp_path, suffix):
    """Each is shown until the next. The clip starts at the first one, at any time. Matroska rounds times."""
    times, brightness = [40, 41, 44, 50, 52], [20, 70, 120, 170, 220]
    with av.open(str(tmp_path / f"a.{suffix}"), "w") as container:
        stream = container.add_stream("mpeg4", rate=16, bit_rate=4_000_000)
        stream.height, stream.width = WIDE
        stream.codec_context.time_base = Fraction(1, 16)
        for time, level in zip(times, brightness, strict=True):
            frame = av.VideoFrame.from_ndarray(numpy.full((*WIDE, 3), level, numpy.uint8), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    levels = read(tmp_path / f"a.{suffix}", count=13).float().mean((1, 2, 3)).tolist()
    assert levels == pytest.approx([20] + [70] * 3 + [120] * 6 + [170] * 2 + [220], abs=4)
