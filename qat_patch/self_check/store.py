"""Stores the verdicts of the self-check in the user's cache: one small file for each case and kind of GPU."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from qat_kernels.verdicts import Case
from qat_patch.version import __version__

FOLDER = "QAT_PATCH_CACHE"
"""The environment variable that names another folder."""
_FORMAT = 1
_MOST_BYTES = 1 << 20
_FIELDS = {"format": int, "key": dict, "case": dict, "state": str}


def folder() -> Path:
    """The folder; it need not exist."""
    if given := os.environ.get(FOLDER):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qat_patch"


def key_of(identity: dict[str, str]) -> dict[str, str]:
    """Everything that a verdict depends on: the kernels' identity, and the version of this package."""
    return identity | {"qat_patch": __version__}


def keep(result: dict[str, Any]) -> bool:
    """Save a result of the self-check: written aside, then renamed, so that no one reads half a file. The last result counts.

    Returns:
        False, with a warning, if it cannot be written. Then there is no verdict.
    """
    record = {"format": _FORMAT, "key": key_of(result["identity"])} | {k: x for k, x in result.items() if k != "identity"}
    name = hashlib.sha256(json.dumps([record["key"], record["case"]], sort_keys=True).encode()).hexdigest()[:32]
    temporary, target = None, None
    try:
        target = folder()
        target.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=target, prefix=".", suffix=".part")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, target / f"{name}.json")
    except (OSError, RuntimeError) as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        warnings.warn(
            f"self-check: the verdict cannot be written to {target or 'the cache'} ({error}): it is lost, and `auto` takes "
            f"triton; set {FOLDER} to a folder that can be written to",
            stacklevel=2,
        )
        return False
    return True


def kept() -> list[dict[str, Any]]:
    """Every complete record of this format; other files are ignored."""
    records = []
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        for file in sorted(folder().glob("*.json")):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                if file.stat().st_size <= _MOST_BYTES and _is_record(record := json.loads(file.read_text(encoding="utf-8"))):
                    records.append(record)
    return records


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or any(not isinstance(record.get(name), kind) for name, kind in _FIELDS.items()):
        return False
    case, wins_from = record["case"], record.get("wins_from")
    numbers = wins_from is None or (isinstance(wins_from, list) and [type(x) for x in wins_from] == [int, int])
    whole = case.keys() == set(Case._fields) and isinstance(case["head_dim"], int) and isinstance(case["causal"], bool)
    texts = all(isinstance(case.get(name), str) for name in ("spec", "dtype")) and isinstance(record.get("words", ""), str)
    known = record["format"] == _FORMAT and record["state"] in ("passed", "failed")
    return known and whole and texts and numbers and not (wins_from and record["state"] != "passed")
