"""List the videos and images of a folder with their captions, from pairs of files or from a table. For prepare-wan-data."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from qat_patch.checkpoint import integrity

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
FILE_COLUMNS = ("file_name", "video", "image", "video_path", "image_path")
"""The names in tables of Datasets and finetrainers, of DiffSynth-Studio, and of musubi-tuner."""
CAPTION_COLUMNS = ("caption", "text", "prompt", "captions")
"""`captions` is ours: a list of texts; each sample gets one of them."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """A video or an image, and its captions."""

    source: str
    """The file, relative to the input folder, with forward slashes."""
    caption: str
    video_sha256: str
    """The SHA-256 of the file. With the captions it shows whether the clip has changed since it was encoded."""
    variants: tuple[str, ...] = ()
    """Other captions."""

    @property
    def is_image(self) -> bool:
        """Whether it is an image, by its name."""
        return is_image(self.source)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        variants = {"variants": list(self.variants)} if self.variants else {}
        return {"source": self.source, "caption": self.caption, "video_sha256": self.video_sha256} | variants


def is_image(name: str) -> bool:
    """Whether a file is an image, by its name."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def list_clips(folder: Path) -> tuple[list[Clip], dict[str, str]]:
    """The clips of a folder by name, and why others were left out.

    Raises:
        ValueError: there are no clips, or the table cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"--input: there is no folder {folder}")
    files = [file for file in (folder / "metadata.jsonl", folder / "metadata.csv") if file.is_file()]
    if len(files) == 2:
        raise ValueError(f"--input: {folder} holds metadata.jsonl and metadata.csv; remove one")
    captions = _from_metadata(files[0], folder) if files else _from_pairs(folder)
    if not captions:
        raise ValueError(f"--input: there is no clip in {folder}; expected metadata.jsonl, metadata.csv, or videos with texts")
    skipped, good = {} if files else _texts_alone(folder), []
    for source, texts in sorted(captions.items()):
        if not (folder / source).is_file():
            skipped[source] = "there is no such file"
        elif not files and is_image(source) and (video := _video_beside(folder / source)):
            skipped[source] = f"the caption is that of {video.name}"
        elif not texts or not all(texts):
            skipped[source] = "it has no caption"
        else:
            good.append(source)
    # Hashing releases the GIL.
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda source: integrity.sha256(folder / source), good))
    clips = [
        Clip(source, captions[source][0], digest, captions[source][1:]) for source, digest in zip(good, digests, strict=True)
    ]
    return clips, skipped


def _pictures(folder: Path) -> list[Path]:
    """All videos and images."""
    return [path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES]


def _video_beside(image: Path) -> Path | None:
    suffixes = (written for suffix in sorted(VIDEO_SUFFIXES) for written in (suffix, suffix.upper()))
    return next((video for video in map(image.with_suffix, suffixes) if video.is_file()), None)


def _from_pairs(folder: Path) -> dict[str, tuple[str, ...]]:
    """Captions by file, from clip.txt beside clip.mp4; empty if there is no text."""
    captions: dict[str, tuple[str, ...]] = {}
    for picture in _pictures(folder):
        text = picture.with_suffix(".txt")
        if text.is_file() or not is_image(picture.name):  # images without a text are covers and the like
            captions[picture.relative_to(folder).as_posix()] = (_read_text(text).strip() if text.is_file() else "",)
    return captions


def _texts_alone(folder: Path) -> dict[str, str]:
    """Texts without a video or image, and why they are left out."""
    suffixes = ", ".join(sorted(VIDEO_SUFFIXES))
    known = {path.with_suffix("") for path in _pictures(folder)}
    texts = (text for text in folder.rglob("*.txt") if text.with_suffix("") not in known)
    return {text.relative_to(folder).as_posix(): f"there is no video of this name ({suffixes}) and no image" for text in texts}


def _from_metadata(file: Path, folder: Path) -> dict[str, tuple[str, ...]]:
    """Captions by file, from a table; empty if there is no caption."""
    captions: dict[str, tuple[str, ...]] = {}
    unused = set()
    for number, row in _csv_rows(file) if file.suffix == ".csv" else _json_rows(file):
        where = f"--input: {file}, row {number}"
        names, texts = ([name for name in known if name in row] for known in (FILE_COLUMNS, CAPTION_COLUMNS))
        # A table of images and videos has one column for each kind.
        names = [name for name in names if row[name]] or names[:1]
        if len(names) != 1 or len(texts) != 1:
            raise ValueError(
                f"{where}: expected file_name and either caption or text, got {', '.join(map(str, row))} "
                "(video, image, video_path and image_path are taken for file_name, and prompt and captions for caption; "
                "one column of each kind)"
            )
        (name,), (text,) = names, texts
        source, caption = row[name], row[text] or ""
        variants = tuple(caption) if text == "captions" and isinstance(caption, list) and caption else (caption,)
        if not isinstance(source, str) or not all(isinstance(variant, str) for variant in variants):
            raise ValueError(f"{where}: expected text in {name} and {text}, got {source!r} and {caption!r}")
        if None in row:
            raise ValueError(
                f"{where}: expected as many columns as in the first line, got {row[None]!r} beyond them; a caption with commas "
                f"needs quotes around it, got {caption!r}"
            )
        path = PurePosixPath(source)
        if path.is_absolute() and Path(source).is_relative_to(folder.resolve()):
            path = PurePosixPath(Path(source).relative_to(folder.resolve()).as_posix())
        if not path.name or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{where}: expected the name of a file in the folder, got {source!r}")
        if path.as_posix() in captions:
            raise ValueError(f"{where}: {source} occurs twice; give a clip one caption, or several as a list in captions")
        captions[path.as_posix()] = tuple(variant.strip() for variant in variants)
        unused |= row.keys() - {*FILE_COLUMNS, text}
    if unused:
        print(f"{file}: not used: {', '.join(sorted(unused))}. Of videos windows are taken at --fps, from the start on")
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
