"""Checkpoints of a run: written aside and renamed when complete, and checked before loading; the newest are kept."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from qat_patch.checkpoint import integrity

FORMAT_VERSION = 4
MANIFEST = "checkpoint.json"
"""Written last: the recipe's state, and size and SHA-256 of every other file, with a hash of itself."""


def steps_in(output_dir: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, ascending. `check` says whether they are complete."""
    found = {}
    for folder in output_dir.glob("checkpoint-*"):
        if name := re.fullmatch(r"checkpoint-(\d+)", folder.name):
            found[int(name[1])] = folder
    return dict(sorted(found.items()))


def find(output_dir: Path, resume: str) -> Path | None:
    """The folder that `resume` names: a path, or the `latest` checkpoint in output_dir, if there is one."""
    if resume != "latest":
        return Path(resume)
    found = steps_in(output_dir)
    return found[max(found)] if found else None


def check(folder: Path) -> dict[str, Any]:
    """Check that every file of a checkpoint is there and unchanged, then read its state.

    Raises:
        ValueError: the checkpoint is missing, incomplete or damaged, or has another format version. The message names the newest
            good one beside it; the user decides which to resume from.
    """
    state, problem = _read(folder)
    if problem is not None:
        good = newest_complete(folder.parent)
        advice = f"resume={good} is complete; remove what is newer first" if good else "there is no other beside it"
        raise ValueError(f"resume: {folder} {problem}; {advice}")
    return state


def newest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is complete and unchanged."""
    return next((folder for folder in reversed(steps_in(output_dir).values()) if _read(folder)[1] is None), None)


def save(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict[str, Any], *, attach: list[Path], keep: int | None
) -> None:
    """Write checkpoint-{step}. Every process calls this. The folder gets its name when it is complete and on disk.

    Args:
        accelerator: holds model, optimizer and everything else that was prepared or registered; random states are saved too.
        output_dir: the run's folder.
        step: optimizer steps done.
        state: plain values that `check` returns.
        attach: files to copy into the checkpoint.
        keep: keep only this many of the newest checkpoints; None keeps all.

    Raises:
        RuntimeError: it could not be written, for example because the disk is full. Older checkpoints do not change.
    """
    folder = output_dir / f"checkpoint-{step}"
    aside = output_dir / f"{folder.name}.incomplete"
    try:
        if accelerator.is_main_process:
            remove_leftovers(output_dir)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for file in attach:
                shutil.copyfile(file, aside / file.name)
            manifest = {"format_version": FORMAT_VERSION, "state": state, "files": integrity.fingerprints(aside)}
            (aside / MANIFEST).write_text(json.dumps(integrity.sealed(manifest), indent=2), encoding="utf-8")
            integrity.sync(aside)
            aside.rename(folder)
            integrity.sync(output_dir, recursive=False)
    # torch and safetensors have their own exceptions for a full disk.
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        good = newest_complete(output_dir)
        raise RuntimeError(
            f"checkpoint: writing {folder} failed: {error}\nThe run stops; "
            + (
                f"its newest complete checkpoint is {good}. Make room, and go on with resume=latest"
                if good
                else "it has no checkpoint"
            )
        ) from error
    if accelerator.is_main_process and keep is not None:
        for old in list(steps_in(output_dir).values())[:-keep]:
            # Rename first: a half-removed folder must not look like a checkpoint.
            old.rename(old.with_name(f"{old.name}.incomplete"))
        remove_leftovers(output_dir)
    accelerator.wait_for_everyone()


def remove_leftovers(output_dir: Path) -> None:
    """Remove the leftovers of a process that was killed while it wrote or removed a checkpoint."""
    for leftover in output_dir.glob("checkpoint-*.incomplete"):
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover)


def _read(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The state, and what is wrong with the checkpoint."""
    if not folder.is_dir():
        return {}, "does not exist"
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if (version := content["format_version"]) != FORMAT_VERSION:
            return {}, f"has format_version {version!r}, and this program reads {FORMAT_VERSION}, as its own version writes it"
        manifest = integrity.unsealed(content)
        state, files = dict(manifest["state"]), {name: dict(record) for name, record in manifest["files"].items()}
        return state, integrity.what_changed(folder, files)
    except FileNotFoundError:
        return {}, f"is incomplete: it has no {MANIFEST}"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return {}, f"is damaged: {MANIFEST} cannot be read ({error})"
