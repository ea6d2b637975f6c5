"""Folders that are written completely or not at all, and hashes that show when a file has changed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_DIGITS = 16
"""The length of the random part of a name."""


@contextlib.contextmanager
def written_aside(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`. It gets that name when it is completely on disk; after an error it is removed.

    Folders that a killed process left behind are removed: a running process holds a lock on its folder, and the system
    releases it when the process ends. The mode of the folder follows the umask.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # No other process may look at the new folder before it is locked.
    with _locked(folder.parent):
        for leftover in folder.parent.glob(f".{glob.escape(folder.name)}-{'[0-9a-f]' * _DIGITS}"):
            with contextlib.suppress(OSError), _locked(leftover, wait=False):
                shutil.rmtree(leftover)
        partial = folder.parent / f".{folder.name}-{secrets.token_hex(_DIGITS // 2)}"
        partial.mkdir()
        lock = contextlib.ExitStack()
        lock.enter_context(_locked(partial))
    with lock:
        try:
            yield partial
            sync(partial)
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    sync(folder.parent, recursive=False)


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """A lock on a folder. It ends with this process at the latest.

    Raises:
        OSError: another process holds it. We do not wait.
    """
    import fcntl  # imported here: Windows does not have it, and importing this module does not need it

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def sync(folder: Path, *, recursive: bool = True) -> None:
    """Wait until a folder is on disk, with all its contents or only the names in it."""
    for path in (*(folder.rglob("*") if recursive else ()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file in a folder, by its relative path."""
    names = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": digest} for name, digest in _sha256(folder, names).items()}


def what_changed(folder: Path, recorded: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with the recorded files, or None if all are there and unchanged."""
    for name, record in recorded.items():
        file = folder / name
        if not file.is_file():
            return f"is incomplete: {name} is missing"
        if file.stat().st_size != record["bytes"]:
            return f"is damaged: {name} has {file.stat().st_size} bytes and was written with {record['bytes']}"
    for name, digest in _sha256(folder, recorded).items():
        if digest != recorded[name]["sha256"]:
            return f"is damaged: the content of {name} has changed since it was written"
    return None


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest with a hash of itself, so that a changed manifest is noticed too."""
    return content | {"sha256": _digest(content)}


def unsealed(content: Any) -> dict[str, Any]:
    """The manifest inside.

    Raises:
        ValueError: it has changed since it was sealed.
    """
    if not isinstance(content, dict):
        raise ValueError(f"expected a mapping, got {type(content).__name__}")
    inside = {key: value for key, value in content.items() if key != "sha256"}
    if content.get("sha256") != _digest(inside):
        raise ValueError("its content has changed since it was written")
    return inside


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256(folder: Path, names: Iterable[str]) -> dict[str, str]:
    # Hashing releases the GIL, and large models have many large files.
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))
