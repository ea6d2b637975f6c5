"""The index of a folder of encoded clips: what `qat-patch prepare-wan-data` and the demo write, and recipes read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from qat_patch.checkpoint import integrity

FORMAT_VERSION = 2
INDEX = "index.json"
EMPTY_CAPTION = "empty_caption.safetensors"
"""The file with the prompt_embeds of an empty caption, for captions that training drops."""
ASIDE = ".incomplete"


def write_index(
    folder: Path,
    settings: Mapping[str, Any],
    clips: Sequence[Mapping[str, Any]],
    skipped: Mapping[str, str],
    *,
    empty_caption: bool = False,
) -> None:
    """Write the index of a folder's clips, once their files are complete.

    Args:
        folder: holds the files; the index is written here.
        settings: settings that all clips share: the encoders, text_length, dtype.
        clips: for each clip its file relative to the folder, its source, and the shapes in it.
        skipped: the sources that were left out, with the reason.
        empty_caption: whether the folder holds the embeddings of an empty caption.
    """
    with ThreadPoolExecutor() as pool:
        names = [clip["file"] for clip in clips]
        digests = dict(zip(names, pool.map(lambda name: integrity.sha256(folder / name), names), strict=True))
    index: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "clips": clips,
        "sha256": digests,
        "skipped": skipped,
    }
    if empty_caption:
        index["empty_caption_sha256"] = integrity.sha256(folder / EMPTY_CAPTION)
    with written_aside(folder / INDEX) as aside:
        aside.write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def written_aside(file: Path) -> Iterator[Path]:
    """A temporary path to write to. It is renamed to `file` on success, and removed after an error."""
    aside = file.with_name(f"{file.name}{ASIDE}")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
