"""Checkpoints of a run: written aside and renamed when complete, checked before anything is loaded, the newest kept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator

FORMAT_VERSION = 1
MANIFEST = "checkpoint.json"
"""Written last: the state that the recipe gave, and size and SHA-256 of every other file."""


def steps_in(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, ascending. Whether they are complete is for `check` to say."""
    found = {}
    for folder in output_dir.glob("checkpoint-*"):
        if name := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            found[int(name[1])] = folder
    return dict(sorted(found.items()))


def find(output_dir: Path, resume: str) -> Path:
    """The folder that `resume` means: `latest` of the run in output_dir, or a path.

    Raises:
        ValueError: there is none.
    """
    if resume != "latest":
        return Path(resume)
    found = steps_in(output_dir)
    if not found:
        raise ValueError(f"resume=latest: there is no checkpoint in {output_dir}; leave resume out to start from the beginning")
    return found[max(found)]


def check(folder: Path) -> dict[str, Any]:
    """Read the state stored in a checkpoint, after checking that every file is there and unchanged.

    Raises:
        ValueError: the checkpoint is missing, incomplete or damaged, or of another format version.
    """

    def damaged(what: str) -> ValueError:
        others = ", ".join(str(other) for other in reversed(steps_in(folder.parent).values()) if other != folder)
        return ValueError(f"resume: {folder} {what}; resume from another checkpoint ({others or 'there is none beside it'})")

    if not folder.is_dir():
        raise damaged("does not exist")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files, state = manifest["format_version"], manifest["files"], manifest["state"]
    except FileNotFoundError:
        raise damaged(f"is incomplete: it has no {MANIFEST}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise damaged(f"is damaged: {MANIFEST} cannot be read ({error})") from error
    if version != FORMAT_VERSION:
        raise damaged(f"has format_version {version}, and this program reads {FORMAT_VERSION}")
    for name, recorded in files.items():
        file = folder / name
        if not file.is_file():
            raise damaged(f"is incomplete: {name} is missing")
        if file.stat().st_size != recorded["bytes"]:
            raise damaged(f"is damaged: {name} has {file.stat().st_size} bytes and was written with {recorded['bytes']}")
    for name, digest in _sha256(folder, files).items():
        if digest != files[name]["sha256"]:
            raise damaged(f"is damaged: the content of {name} has changed since it was written")
    return state


def save(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict[str, Any], *, attach: list[Path], keep: int | None
) -> None:
    """Write checkpoint-{step}. Every process calls this; the folder gets its name when it is complete and on disk.

    Args:
        accelerator: holds model, optimizer and what else was prepared or registered; random states are saved too.
        output_dir: the run's folder.
        step: optimizer steps done.
        state: plain values that `check` returns.
        attach: files to copy into the checkpoint.
        keep: remove all but the newest so many checkpoints; None keeps all.
    """
    folder = output_dir / f"checkpoint-{step}"
    aside = output_dir / f"{folder.name}.incomplete"
    if accelerator.is_main_process:
        for leftover in output_dir.glob("checkpoint-*.incomplete"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for file in attach:
            shutil.copyfile(file, aside / file.name)
        names = sorted(file.relative_to(aside).as_posix() for file in aside.rglob("*") if file.is_file())
        digests = _sha256(aside, names)
        files = {name: {"bytes": (aside / name).stat().st_size, "sha256": digests[name]} for name in names}
        manifest = {"format_version": FORMAT_VERSION, "state": state, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
        for path in (*aside.rglob("*"), aside):
            _sync(path)
        aside.rename(folder)
        _sync(output_dir)
        if keep is not None:
            for old in list(steps_in(output_dir).values())[:-keep]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _sha256(folder: Path, names: Iterable[str]) -> dict[str, str]:
    def digest(name: str) -> str:
        sha256 = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(1 << 22):
                sha256.update(chunk)
        return sha256.hexdigest()

    # Hashing lets other threads run, and the checkpoints of large models are many large files.
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
