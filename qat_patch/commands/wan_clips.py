"""Read frames of videos at a given rate and size, as players show them, and images as one frame. For prepare-wan-data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import Any

import av
import numpy
import torch
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import Dataset

from .clip_captions import Clip, is_image

_STILL = Disposition.attached_pic | Disposition.still_image | Disposition.timed_thumbnails
_MILLISECOND = Fraction(1, 1000)
_PICTURE_CODECS = {"bmp", "gif", "jpegls", "jpeg2000", "mjpeg", "png", "tiff", "webp"}
_QUARTERS = ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))
"""Clockwise turns."""
_TRANSPOSES = {
    (1, 0, 0, 1): (),
    (-1, 0, 0, 1): (Image.Transpose.FLIP_LEFT_RIGHT,),
    (1, 0, 0, -1): (Image.Transpose.FLIP_TOP_BOTTOM,),
    (-1, 0, 0, -1): (Image.Transpose.ROTATE_180,),
    (0, 1, 1, 0): (Image.Transpose.TRANSPOSE,),
    (0, 1, -1, 0): (Image.Transpose.ROTATE_270,),
    (0, -1, 1, 0): (Image.Transpose.ROTATE_90,),
    (0, -1, -1, 0): (Image.Transpose.TRANSVERSE,),
}
"""The Pillow operation for each display matrix. Pillow turns counterclockwise."""


class UnusableClip(Exception):
    """Why a clip is left out."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """Clips from one video, all of the same length and size."""

    frames: list[torch.Tensor]
    """For each window uint8 [frames, height, width, 3]."""
    starts: list[int]
    """For each window the number of its first frame, at the requested rate."""
    source_frames: int | None
    """How many frames the video has at this rate; None: more than were read."""
    source_size: tuple[int, int]
    """Height and width as players show the video."""


class Frames(Dataset):
    """For each clip its `Windows` and an empty text, or None and the reason why the clip cannot be used.

    A dataset, so that worker processes can decode while the encoders work.
    """

    def __init__(self, folder: Path, clips: list[Clip], **how: Any) -> None:
        self.folder, self.clips, self.how = folder, clips, how

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[Windows | None, str]:
        try:
            return read_windows(self.folder / self.clips[index].source, **self.how), ""
        except UnusableClip as reason:
            return None, str(reason)


def read_clip(path: Path, *, num_frames: Sequence[int], resolutions: Sequence[tuple[int, int]], fps: float) -> torch.Tensor:
    """The start of a video: the one window of `read_windows`, uint8 [frames, height, width, 3]."""
    return read_windows(path, num_frames=num_frames, resolutions=resolutions, fps=fps).frames[0]


def read_windows(
    path: Path, *, num_frames: Sequence[int], resolutions: Sequence[tuple[int, int]], fps: float, windows: int = 1
) -> Windows:
    """Parts of a video as players show it, resampled, resized and centre-cropped; of an image the one frame.

    Args:
        path: the video or the image.
        num_frames: allowed lengths; the largest that the video fills is taken.
        resolutions: allowed (height, width), for `nearest_resolution`.
        fps: frames per second.
        windows: how many windows, spread evenly from start to end; one means the start. Short videos have fewer.

    Raises:
        UnusableClip: the file is damaged, too short or not a video, or players turn it by other than quarter turns.
    """
    if is_image(path.name):
        image = _read_image(path)
        size = (image.height, image.width)
        return Windows([_resized(image, nearest_resolution(size, resolutions))[None]], [0], 1, size)
    wanted, longest = [0], max(num_frames)
    try:
        # The places of several windows depend on the length, and containers often state it wrongly.
        total = sum(1 for _ in _decode(path, fps)) if windows > 1 else None
        if total is not None:
            longest = length_of(total, num_frames, fps)
            wanted = spread(total, longest, windows)
        images: dict[int, torch.Tensor] = {}
        for number, (shape, frame) in enumerate(islice(_decode(path, fps), wanted[-1] + longest)):
            if not images:
                shown = shape.shown(frame)
                size = (shown.height, shown.width)
            if any(start <= number < start + longest for start in wanted):
                # Resize at once: frames of full size take much memory.
                images[number] = _resized(shape.shown(frame), nearest_resolution(size, resolutions))
    except av.FFmpegError as error:
        raise UnusableClip(f"it cannot be decoded: {error.strerror}") from error
    if total is None and len(images) < longest:
        total = len(images)
    length = longest if total is None else length_of(total, num_frames, fps)
    return Windows([torch.stack([images[start + n] for n in range(length)]) for start in wanted], wanted, total, size)


def nearest_resolution(size: tuple[int, int], resolutions: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The allowed (height, width) with the nearest aspect ratio; the first of equals."""
    height, width = size
    return min(resolutions, key=lambda one: abs(math.log(one[0] / one[1] * width / height)))


def length_of(total: int, num_frames: Sequence[int], fps: float) -> int:
    """The largest allowed length that `total` frames fill.

    Raises:
        UnusableClip: there is none.
    """
    lengths = [number for number in num_frames if number <= total]
    if not lengths:
        least = min(num_frames)
        raise UnusableClip(
            f"it is too short: {total} frames at {fps:g} fps, and at least {least} are needed; --num-frames can allow fewer"
        )
    return max(lengths)


def spread(total: int, length: int, windows: int) -> list[int]:
    """The starts of windows of one length, spread evenly over a video; only different starts."""
    last = total - length
    count = min(windows, last + 1)
    return [0] if count == 1 else [round(number * last / (count - 1)) for number in range(count)]


def _read_image(path: Path) -> Image.Image:
    """An image as viewers show it."""
    try:
        with Image.open(path) as image:
            if getattr(image, "n_frames", 1) > 1:
                raise UnusableClip("it is an animation; make it a video")
            image.load()
            upright = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UnusableClip(f"it cannot be decoded: {error}") from error
    if upright.has_transparency_data and upright.convert("RGBA").getchannel("A").tobytes().strip(b"\xff"):
        raise UnusableClip("it is transparent in parts; put it on a background")
    return upright.convert("RGB")


def _resized(image: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Resized and centre-cropped, uint8 [height, width, 3]."""
    return torch.from_numpy(numpy.array(VideoProcessor().resize(image, *size, resize_mode="crop")))


def _decode(path: Path, fps: float) -> Iterator[tuple[_Shape, Any]]:
    """The decoded frames, each with its `_Shape`."""
    with av.open(str(path)) as container:
        stream = _main_video(container)
        shape = _Shape.of(stream)
        graph = av.filter.Graph()
        # With rounding up, each new time shows the last frame that is not later, and the first frame stays the first.
        filters = [graph.add("fps", f"fps={fps}:round=up")]
        if stream.time_base == _MILLISECOND:
            # Matroska rounds times to milliseconds, so half a millisecond does not count as later.
            filters = [graph.add("settb", "1/1000000"), graph.add("setpts", "PTS-500"), *filters]
        graph.link_nodes(graph.add_buffer(template=stream), *filters, graph.add("buffersink")).configure()
        for decoded in chain(container.decode(stream), [None]):
            if decoded is not None and decoded.is_corrupt:
                raise UnusableClip("it is damaged: a frame could be decoded only in part")
            graph.push(decoded)
            with contextlib.suppress(BlockingIOError, EOFError):
                while True:
                    yield shape, graph.pull()


def _main_video(container: Any) -> Any:
    """The video stream that players show: not a cover, and of several the marked one, else the first."""
    videos = [stream for stream in container.streams.video if not stream.disposition & _STILL]
    if not videos:
        raise UnusableClip("there is no video in it")

    def rank(stream: Any) -> tuple[bool, bool, bool]:
        # Not all covers are marked. 0 frames mean that the number is unknown.
        name, is_default = stream.codec_context.name, bool(stream.disposition & Disposition.default)
        return stream.frames != 1, name not in _PICTURE_CODECS, is_default

    return max(videos, key=rank)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How players show decoded frames: the shape of a pixel, and how the frame is turned and mirrored."""

    pixel: float
    """Width of a pixel over its height."""
    tagged: tuple[int, int, int, int]
    """Where x and y of a frame go (x to x, x to y, y to x, y to y), unless the frame itself says so."""

    @classmethod
    def of(cls, stream: Any) -> _Shape:
        # Old programs write a tag in degrees clockwise; new ones write a matrix.
        tag = next((value for name, value in stream.metadata.items() if name.lower() == "rotate"), "0")
        degrees = int(float(tag)) if re.fullmatch(r"-?\d{1,4}(\.0*)?", tag) else None
        if degrees is None or degrees % 90:
            raise UnusableClip(f"it is shown turned by {tag} degrees; only quarter turns are known")
        return cls(float(stream.sample_aspect_ratio or 1), _QUARTERS[degrees // 90 % 4])

    def shown(self, frame: Any) -> Image.Image:
        """A decoded frame as players show it."""
        image = frame.to_image()
        if self.pixel != 1:
            # The longer side grows, so that nothing is lost.
            width, height = image.size
            width, height = (width * self.pixel, height) if self.pixel > 1 else (width, height / self.pixel)
            image = image.resize((max(1, round(width)), max(1, round(height))), Image.Resampling.BICUBIC)
        matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
        turn = self.tagged if matrix is None else _directions(struct.unpack("=9i", bytes(matrix)))
        for step in _TRANSPOSES[turn]:
            image = image.transpose(step)
        return image


def _directions(matrix: tuple[int, ...]) -> tuple[int, int, int, int]:
    """Where a display matrix sends x and y. The shape of the pixels already holds its scale."""
    a, b, c, d = turn = tuple((x > 0) - (x < 0) for x in (matrix[0], matrix[1], matrix[3], matrix[4]))
    if (a, b, c, d) not in _TRANSPOSES:
        raise UnusableClip(
            f"it is shown turned by a display matrix of ({', '.join(map(str, turn))}): only quarter turns are known"
        )
    return a, b, c, d
