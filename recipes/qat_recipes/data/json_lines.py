"""JSON lines, read one by one: what is wrong is said with the number of the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json_lines(path: Path, columns: dict[str, type]) -> Iterator[dict[str, Any]]:
    """The rows of a file, each with these columns.

    Raises:
        ValueError: a line that is no JSON object, or a row without one of the columns or with another type in it. The rows
            before it have been given by then.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                start = line[:80].decode("utf-8", "replace").strip()
                raise ValueError(f"{where}: expected a JSON object, got {start!r} ({error}); mend or remove the line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}; mend or remove the line")
            for name, kind in columns.items():
                if not isinstance(row.get(name), kind):
                    keys = ", ".join(sorted(row)) or "nothing"
                    raise ValueError(
                        f"{where}: expected {name!r} to be a {kind.__name__}, got {row.get(name)!r}; the line has {keys}; mend "
                        "or remove it"
                    )
            yield row
