"""JSON lines, read one by one; errors name the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_WORDS: dict[Any, str] = {str: "text", list: "a list"}


def read_json_lines(path: Path, columns: dict[str, type], *, may_be_null: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a file, each with these columns.

    Args:
        path: the file.
        columns: their names and types.
        may_be_null: a value may be null.

    Raises:
        ValueError: a line is not a JSON object, holds half a character, or lacks a column or has another type in it. The rows
            before it were already returned.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                start = line[:80].decode("utf-8", "replace").strip()
                raise ValueError(f"{where}: expected a JSON object, got {start!r} ({error}); fix or delete the line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}; fix or delete the line")
            if rb"\u" in line:
                check_characters(where, row)
            for name, kind in columns.items():
                value = row.get(name)
                if not isinstance(value, kind) and not (may_be_null and name in row and value is None):
                    keys = ", ".join(sorted(row)) or "nothing"
                    what = f"the column {name!r} is not {_WORDS[kind]}"
                    if name not in row:
                        what = f"there is no column {name!r}; set text_column to one of {keys}"
                    raise ValueError(
                        f"{where}: expected {name!r} to be a {kind.__name__}, got {str(value)[:80]}: {what}; or "
                        "fix or delete the line"
                    )
            yield row


def check_characters(where: str, value: Any) -> None:
    """Raise a ValueError if text anywhere in a value holds half a character (a surrogate), which no tokenizer accepts."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: half a character in its text ({error}); fix or delete the line") from error
