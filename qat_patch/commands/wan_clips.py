"""Videos with captions in a folder: which there are, and their frames at a given rate and size. For prepare-wan-data."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import av
import numpy
import torch
from diffusers.video_processor import VideoProcessor
from torch.utils.data import Dataset

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


class UnusableClip(Exception):
    """Why a clip is left out."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video and its caption."""

    source: str
    """The video, relative to the input folder, with forward slashes."""
    caption: str
    bytes: int
    """Size of the video. With the caption it tells whether the clip has changed since it was encoded."""


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
    clips, skipped = [], {}
    for source, caption in sorted(captions.items()):
        if not (folder / source).is_file():
            skipped[source] = "there is no such file"
        elif not caption:
            skipped[source] = "it has no caption"
        else:
            clips.append(Clip(source, caption, (folder / source).stat().st_size))
    return clips, skipped


def read_clip(path: Path, *, num_frames: Sequence[int], resolutions: Sequence[tuple[int, int]], fps: float) -> torch.Tensor:
    """The start of a video, resampled, resized and centre-cropped: uint8 [frames, height, width, 3].

    Args:
        path: the video.
        num_frames: lengths on offer; the largest that the video fills is taken.
        resolutions: (height, width) on offer; the one with the nearest aspect ratio is taken, of equals the first.
        fps: frames a second.

    Raises:
        UnusableClip: it is damaged, too short or no video.
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


def _decode(path: Path, fps: float) -> Iterator[Any]:
    """Frames as PIL images."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UnusableClip("there is no video in it")
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        # Rounding up, a frame is the last one that is not later than its new time, and the first remains the first.
        resample = graph.add("fps", f"fps={fps}:round=up")
        graph.link_nodes(graph.add_buffer(template=stream), resample, graph.add("buffersink")).configure()
        for decoded in chain(container.decode(stream), [None]):
            if decoded is not None and decoded.is_corrupt:
                raise UnusableClip("it is damaged: a frame could be decoded only in part")
            graph.push(decoded)
            with contextlib.suppress(BlockingIOError, EOFError):
                while True:
                    frame = graph.pull()
                    # Phones store portrait videos lying down, with a note to turn them.
                    yield frame.to_image().rotate(frame.rotation, expand=True)


def _from_pairs(folder: Path) -> dict[str, str]:
    """Captions by video, from clip.txt beside clip.mp4; empty where there is none."""
    captions = {}
    for video in folder.rglob("*"):
        if video.suffix.lower() in VIDEO_SUFFIXES:
            text = video.with_suffix(".txt")
            captions[video.relative_to(folder).as_posix()] = _read_text(text).strip() if text.is_file() else ""
    return captions


def _from_metadata(file: Path) -> dict[str, str]:
    """Captions by video, from a table; empty where there is none."""
    captions = {}
    lines = io.StringIO(_read_text(file))
    rows = csv.DictReader(lines) if file.suffix == ".csv" else map(_json_row, filter(str.strip, lines))
    for number, row in enumerate(rows, 1):
        where = f"--input: {file}, row {number}"
        columns = [name for name in ("caption", "text") if name in row]
        if "file_name" not in row or len(columns) != 1:
            raise ValueError(f"{where}: expected file_name and either caption or text, got {', '.join(map(str, row))}")
        source, caption = row["file_name"], row[columns[0]] or ""
        if not isinstance(source, str) or not isinstance(caption, str):
            raise ValueError(f"{where}: expected text in file_name and {columns[0]}, got {source!r} and {caption!r}")
        path = PurePosixPath(source)
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: expected the name of a file in the folder, got {source!r}")
        if path.as_posix() in captions:
            raise ValueError(f"{where}: {source} occurs twice; give a clip one caption")
        captions[path.as_posix()] = caption.strip()
    return captions


def _read_text(file: Path) -> str:
    try:
        # Spreadsheets put a byte order mark in front.
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--input: {file}: not UTF-8 text: {error}") from error


def _json_row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    return row if isinstance(row, dict) else {line.strip(): None}
