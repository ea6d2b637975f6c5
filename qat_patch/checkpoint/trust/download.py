"""Download exports and base models from the Hub: only the files that are needed, from one commit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .file_names import MANIFEST, check_plain, weights_of_a_base_model

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def export_folder(name: str | Path, revision: str | None) -> Path:
    """The folder of an export: a local one, or the files from the Hub that its manifest lists.

    Raises:
        ValueError: neither a folder nor a repository of this name exists, or a revision is given for a folder.
    """
    if is_folder(name, revision):
        return Path(name)
    snapshot = _snapshot(str(name), revision, [MANIFEST])
    try:
        listed = list(json.loads((snapshot / MANIFEST).read_bytes())["files"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {name}: there is no export in this repository: {MANIFEST}: {error}") from error
    for file in listed:
        check_plain(f"{name}: {MANIFEST}", file)  # so it cannot be a pattern
    # From the same commit, even if another is pushed meanwhile.
    return _snapshot(str(name), snapshot.name, [MANIFEST, *listed])


def holds_export(name: str | Path, revision: str | None) -> bool:
    """Whether a folder or Hub repository holds an export."""
    folder = Path(name) if is_folder(name, revision) else _snapshot(str(name), revision, [MANIFEST])
    return (folder / MANIFEST).is_file()


def base_folder(name: str, host: str) -> Path:
    """The folder of the base model that adapters name: a local one, or config and safetensors weights from the Hub."""
    return Path(name) if is_folder(name, None) else _snapshot(name, None, weights_of_a_base_model(host))


def is_folder(name: str | Path, revision: str | None) -> bool:
    """Whether this is a local folder, or cannot be a name on the Hub."""
    found = Path(name).exists() or not _REPOSITORY.fullmatch(str(name))
    if found and revision is not None:
        raise ValueError(
            f"load_checkpoint: revision: has no effect for the folder {name}; leave it out, or pass a name on the Hub"
        )
    return found


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    arguments: dict[str, Any] = {"revision": revision, "allow_patterns": patterns}
    try:
        return Path(huggingface_hub.snapshot_download(name, **arguments))
    except Exception as error:
        raise ValueError(
            f"load_checkpoint: {name} is not a local folder and cannot be downloaded from the Hub "
            f"(revision {revision or 'main'}): {error}"
        ) from error
