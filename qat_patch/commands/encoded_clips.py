"""The files of encoded clips: which exist, whether they belong to these clips and settings, and which are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .clip_captions import Clip
from .wan_clips import Windows, length_of, nearest_resolution, spread

_MAY_GROW = ("num_frames", "resolutions")
"""Settings that change which clips are encoded to which size, but not the encoding itself."""


def file_of(output: Path, clip: Clip, start: int) -> Path:
    """Where a window of a clip is stored."""
    return output / "clips" / (f"{clip.source}.{start}.safetensors" if start else f"{clip.source}.safetensors")


def record_of(clip: Clip, windows: Windows, number: int, fps: float) -> dict[str, Any]:
    """The record of a window, for the header of its file and for the index."""
    length, height, width, _ = windows.frames[number].shape
    start = {"start": windows.starts[number]} if windows.starts[number] else {}
    return {
        **clip.record(),
        "frames": length,
        "height": height,
        "width": width,
        "fps": fps,
        **start,
        "source_frames": windows.source_frames,
        "source_size": list(windows.source_size),
    }


def finished(output: Path, clip: Clip, settings: dict[str, Any], windows: int) -> list[dict[str, Any]] | None:
    """The index entries of all windows of a clip; None if some are missing, or if the video has to be read to know.

    Raises:
        ValueError: it was done with other settings.
    """
    first = entry(output, clip, 0, settings)
    if first is None:
        return None
    place = _place(first, clip, settings, windows)
    if place is None:
        return None
    length, size, starts = place
    entries = [entry(output, clip, start, settings) for start in starts]
    same = [one for one in entries if one is not None and (one["frames"], one["height"], one["width"]) == (length, *size)]
    return same if len(same) == len(starts) else None


def entry(output: Path, clip: Clip, start: int, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The index entry of a finished window of the clip as it is now, from the header of its file; else None.

    Raises:
        ValueError: it was encoded with other settings. Added lengths and resolutions are allowed.
    """
    file = file_of(output, clip, start)
    try:
        with safe_open(file, framework="pt") as tensors:
            record = json.loads(tensors.metadata()["clip"])
            shapes = {name: tensors.get_slice(name).get_shape() for name in sorted(tensors.keys())}
    except (FileNotFoundError, SafetensorError):
        return None
    then = record.pop("settings")
    names = [name for name in settings | then if then.get(name) != settings.get(name) and not _has_grown(name, then, settings)]
    if names:
        differences = "; ".join(f"{name} was {then.get(name)!r} and is {settings.get(name)!r}" for name in names)
        raise ValueError(f"--output: {file} was made with other settings: {differences}; choose another folder")
    about = ("source", "caption", "video_sha256", "variants", "start")
    now = clip.record() | ({"start": start} if start else {})
    if any(record.get(name) != now.get(name) for name in about):
        return None
    return {"file": file.relative_to(output).as_posix(), **record, "shapes": shapes, "offered": then}


def _has_grown(name: str, then: dict[str, Any], now: dict[str, Any]) -> bool:
    return name in _MAY_GROW and all(value in now[name] for value in then.get(name, [None]))


def _place(
    first: dict[str, Any], clip: Clip, settings: dict[str, Any], windows: int
) -> tuple[int, tuple[int, int], list[int]] | None:
    """The length, size and starts of a clip's windows with these settings; None if they are not known."""
    then = first["offered"]
    if windows == 1 and all(then[name] == settings[name] for name in _MAY_GROW):
        return first["frames"], (first["height"], first["width"]), [0]
    if "source_size" not in first:  # written by an older version
        return None
    height, width = first["source_size"]
    size = nearest_resolution((height, width), [(one[0], one[1]) for one in settings["resolutions"]])
    if clip.is_image:
        return 1, size, [0]
    total = first["source_frames"]
    if total is not None:
        length = length_of(total, settings["num_frames"], settings["fps"])
        return length, size, spread(total, length, windows)
    # The video is at least as long as the part that was read.
    longest = max(settings["num_frames"])
    return (longest, size, [0]) if windows == 1 and longest <= max(then["num_frames"]) else None
