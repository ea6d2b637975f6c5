"""Untrusted JSON: objects of bounded size, in which every key occurs once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_LARGEST = 1 << 26


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of an export.

    Raises:
        ValueError: the file does not exist or holds something else.
    """
    if not file.is_file():
        raise ValueError(f"load_checkpoint: {file} does not exist; the export is incomplete")
    return parse_json(str(file), file.read_bytes())


def parse_json(where: str, content: bytes) -> dict[str, Any]:
    """The JSON object in the content of a file.

    Raises:
        ValueError: it holds something else.
    """
    if len(content) > _LARGEST:
        raise ValueError(f"load_checkpoint: {where}: expected at most {_LARGEST} bytes, got {len(content)}")
    try:
        found = json.loads(content.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {where} is not JSON ({error}); the export is damaged") from error
    if not isinstance(found, dict):
        raise ValueError(f"load_checkpoint: {where}: expected a JSON object, got {type(found).__name__}; the export is damaged")
    return found


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content
