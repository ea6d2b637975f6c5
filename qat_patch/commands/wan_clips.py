"""Videos with captions in a folder: which there are, and their frames at a given rate and size. For prepare-wan-data."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy
import torch
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch.utils.data import Dataset

from qat_patch.checkpoint import integrity

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
FILE_COLUMNS, CAPTION_COLUMNS = ("file_name", "video"), ("caption", "text", "prompt")
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
"""What turns and mirrors a picture as a display matrix does. Pillow turns counterclockwise."""


class UnusableClip(Exception):
    """Why a clip is left out."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video and its caption."""

    source: str
    """The video, relative to the input folder, with forward slashes."""
    caption: str
    video_sha256: str
    """Of the video. With the caption it tells whether the clip has changed since it was encoded."""


class Frames(Dataset):
    """For each clip `read_clip`'s frames and an empty text, or None and the reason why the clip cannot be used.

    So that worker processes can decode while the encoders work.
    """

    def __init__(self, folder: Path, clips: list[Clip], **how: Any) -> None:
        self.folder, self.clips, self.how = folder, clips, how

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, str]:
        try:
            return read_clip(self.folder / self.clips[index].source, **self.how), ""
        except UnusableClip as reason:
            return None, str(reason)


def list_clips(folder: Path) -> tuple[list[Clip], dict[str, str]]:
    """The clips of a folder, by name, and the reasons for leaving out others.

    Raises:
        ValueError: there are none, or metadata that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"--input: there is no folder {folder}")
    files = [file for file in (folder / "metadata.jsonl", folder / "metadata.csv") if file.is_file()]
    if len(files) == 2:
        raise ValueError(f"--input: {folder} holds metadata.jsonl and metadata.csv; remove one")
    captions = _from_metadata(files[0]) if files else _from_pairs(folder)
    if not captions:
        raise ValueError(f"--input: there is no clip in {folder}; expected metadata.jsonl, metadata.csv, or videos with texts")
    skipped, good = {} if files else _texts_alone(folder), []
    for source, caption in sorted(captions.items()):
        if not (folder / source).is_file():
            skipped[source] = "there is no such file"
        elif not caption:
            skipped[source] = "it has no caption"
        else:
            good.append(source)
    # Hashing lets other threads run.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda source: integrity.sha256(folder / source), good))
    return [Clip(source, captions[source], digest) for source, digest in zip(good, digests, strict=True)], skipped


def read_clip(path: Path, *, num_frames: Sequence[int], resolutions: Sequence[tuple[int, int]], fps: float) -> torch.Tensor:
    """The start of a video as players show it, resampled, resized and centre-cropped: uint8 [frames, height, width, 3].

    Args:
        path: the video.
        num_frames: lengths on offer; the largest that the video fills is taken.
        resolutions: (height, width) on offer; the one with the nearest aspect ratio is taken, of equals the first.
        fps: frames a second.

    Raises:
        UnusableClip: it is damaged, too short or no video, or is shown turned by something else than quarter turns.
    """
    images: list[torch.Tensor] = []
    try:
        for image in islice(_decode(path, fps), max(num_frames)):
            if not images:
                height, width = min(resolutions, key=lambda size: abs(math.log(size[0] / size[1] * image.width / image.height)))
            # At once, for frames of full size take much memory.
            image = VideoProcessor().resize(image, height, width, resize_mode="crop")
            images.append(torch.from_numpy(numpy.array(image)))
    except av.FFmpegError as error:
        raise UnusableClip(f"it cannot be decoded: {error.strerror}") from error
    lengths = [number for number in num_frames if number <= len(images)]
    if not lengths:
        raise UnusableClip(f"it is too short: {len(images)} frames at {fps:g} fps, and at least {min(num_frames)} are needed")
    return torch.stack(images[: max(lengths)])


def _decode(path: Path, fps: float) -> Iterator[Image.Image]:
    """Frames with square pixels, upright."""
    with av.open(str(path)) as container:
        stream = _main_video(container)
        shape = _Shape.of(stream)
        graph = av.filter.Graph()
        # Rounding up, a frame is the last one that is not later than its new time, and the first remains the first.
        filters = [graph.add("fps", f"fps={fps}:round=up")]
        if stream.time_base == _MILLISECOND:
            # Matroska rounds times to milliseconds: half of one later is not later.
            filters = [graph.add("settb", "1/1000000"), graph.add("setpts", "PTS-500"), *filters]
        graph.link_nodes(graph.add_buffer(template=stream), *filters, graph.add("buffersink")).configure()
        for decoded in chain(container.decode(stream), [None]):
            if decoded is not None and decoded.is_corrupt:
                raise UnusableClip("it is damaged: a frame could be decoded only in part")
            graph.push(decoded)
            with contextlib.suppress(BlockingIOError, EOFError):
                while True:
                    yield shape.shown(graph.pull())


def _main_video(container: Any) -> Any:
    """The video that players show: no cover, and of several the one that is marked, or else the first."""
    videos = [stream for stream in container.streams.video if not stream.disposition & _STILL]
    if not videos:
        raise UnusableClip("there is no video in it")

    def rank(stream: Any) -> tuple[bool, bool, bool]:
        # Not all covers are marked as such. Where 0 frames are said, it is not known how many there are.
        name, is_default = stream.codec_context.name, bool(stream.disposition & Disposition.default)
        return stream.frames != 1, name not in _PICTURE_CODECS, is_default

    return max(videos, key=rank)


@dataclasses.dataclass(frozen=True)
class _Shape:
    """How decoded frames are to be shown: which shape a pixel has, and how the frame is turned and mirrored."""

    pixel: float
    """Width of a pixel over its height."""
    tagged: tuple[int, int, int, int]
    """Where x and y of a frame go, (x to x, x to y, y to x, y to y), where the frame itself does not say so."""

    @classmethod
    def of(cls, stream: Any) -> _Shape:
        # Old programs wrote a tag, in degrees clockwise, where new ones write a matrix.
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
    """Where a display matrix sends x and y. How much it scales is in the shape of the pixels already."""
    a, b, c, d = turn = tuple((x > 0) - (x < 0) for x in (matrix[0], matrix[1], matrix[3], matrix[4]))
    if (a, b, c, d) not in _TRANSPOSES:
        raise UnusableClip(
            f"it is shown turned by a display matrix of ({', '.join(map(str, turn))}): only quarter turns are known"
        )
    return a, b, c, d


def _from_pairs(folder: Path) -> dict[str, str]:
    """Captions by video, from clip.txt beside clip.mp4; empty where there is none."""
    captions = {}
    for video in folder.rglob("*"):
        if video.suffix.lower() in VIDEO_SUFFIXES:
            text = video.with_suffix(".txt")
            captions[video.relative_to(folder).as_posix()] = _read_text(text).strip() if text.is_file() else ""
    return captions


def _texts_alone(folder: Path) -> dict[str, str]:
    """Texts that are captions of nothing, and why."""
    suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
    videos = {path.with_suffix("") for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES}
    texts = (text for text in folder.rglob("*.txt") if text.with_suffix("") not in videos)
    return {text.relative_to(folder).as_posix(): f"there is no video of this name ({suffixes})" for text in texts}


def _from_metadata(file: Path) -> dict[str, str]:
    """Captions by video, from a table; empty where there is none."""
    captions, unused = {}, set()
    for number, row in _csv_rows(file) if file.suffix == ".csv" else _json_rows(file):
        where = f"--input: {file}, row {number}"
        names, texts = ([name for name in known if name in row] for known in (FILE_COLUMNS, CAPTION_COLUMNS))
        if len(names) != 1 or len(texts) != 1:
            raise ValueError(
                f"{where}: expected file_name and either caption or text, got {', '.join(map(str, row))} "
                "(video is taken for file_name, and prompt for caption; one column of each kind)"
            )
        (name,), (text,) = names, texts
        source, caption = row[name], row[text] or ""
        if not isinstance(source, str) or not isinstance(caption, str):
            raise ValueError(f"{where}: expected text in {name} and {text}, got {source!r} and {caption!r}")
        if None in row:
            raise ValueError(
                f"{where}: expected as many columns as in the first line, got {row[None]!r} beyond them; a caption with commas "
                f"needs quotes around it, got {caption!r}"
            )
        path = PurePosixPath(source)
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: expected the name of a file in the folder, got {source!r}")
        if path.as_posix() in captions:
            raise ValueError(f"{where}: {source} occurs twice; give a clip one caption")
        captions[path.as_posix()] = caption.strip()
        unused |= row.keys() - {name, text}
    if unused:
        print(f"{file}: not used: {', '.join(sorted(unused))}. Of every clip the start is taken, at --fps")
    return captions


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    rows = csv.DictReader(io.StringIO(_read_text(file)), strict=True)
    number = 0
    try:
        columns = rows.fieldnames or []
        if len({*columns}) != len(columns):
            raise ValueError(f"--input: {file}: expected columns with different names, got {', '.join(columns)}")
        for number, row in enumerate(rows, 1):
            yield number, row
    except csv.Error as error:
        raise ValueError(f"--input: {file}, after row {number}: no CSV: {error}") from error


def _json_rows(file: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    for number, line in enumerate(io.StringIO(_read_text(file)), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else {line.strip()[:80]: None}


def _read_text(file: Path) -> str:
    try:
        # Spreadsheets put a byte order mark in front.
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--input: {file}: not UTF-8 text: {error}") from error
