"""Runs the self-check in a child process, because a wrong kernel may crash it, and turns the child's end into a verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import qat_kernels

COMMAND: tuple[str, ...] = (sys.executable, "-m", "qat_kernels.self_check")
SECONDS = 600.0
"""The time limit for one case on average, including compilers. A kernel that hangs is killed after it."""
_RANK = frozenset(f"{of}{what}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE", "NAME"))
_MASTER = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
"""Environment variables of distributed runs, by name and by prefix. The child must not see them: it runs alone."""


def results(device: str, cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The child's result for each case, in order. If a case crashes the child, its result says how, and a new child continues.

    Args:
        device: such as `cuda:0`.
        cases: dicts of `Case.to_dict`.

    Yields:
        For each case a dict with `case`, `state` (`passed`, `failed`, or `none` for no verdict) and `reason`.
    """
    left = list(cases)
    while left:
        request = json.dumps({"device": device, "cases": left})
        status: int | None
        try:
            # Run in the package's folder: Python looks for modules in the working directory first, which may be untrusted.
            done = subprocess.run(
                [*COMMAND, request],
                capture_output=True,
                timeout=SECONDS * len(left),
                env=_environment(),
                cwd=Path(qat_kernels.__file__).parents[1],
                check=False,
            )
            status, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            status, out, err = None, late.stdout or b"", late.stderr or b""
        said = _said(out, left)
        yield from said
        left = left[len(said) :]
        if left and not (said and said[-1]["state"] != "passed" and status and status > 0):
            # The child said nothing about this case, and no earlier result explains its end.
            yield {"case": left.pop(0)} | _end(status, err)


def _said(out: bytes, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The child's lines about these cases, in this order. Other output is ignored."""
    found: list[dict[str, Any]] = []
    for line in out.decode("utf-8", errors="replace").splitlines():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        if isinstance(result, dict) and len(found) < len(cases) and result.get("case") == cases[len(found)]:
            found.append(result)
    return found


def _end(status: int | None, err: bytes) -> dict[str, Any]:
    """The verdict on a case whose child ended without a result for it."""
    last = ([line for line in err.decode("utf-8", errors="replace").splitlines() if line.strip()] or [""])[-1][:300]
    if status is None:
        return {"state": "failed", "reason": f"it hung: killed after {SECONDS:g} s a case"}
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return {"state": "failed", "reason": f"killed by {name}"}
    if "out of memory" in last.lower() or "MemoryError" in last:
        return {"state": "none", "reason": f"out of memory: {last}"}
    return {"state": "failed", "reason": f"crashed with status {status}: {last}"}


def _environment() -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _RANK and not name.startswith(_MASTER)}
    paths = [str(Path(qat_kernels.__file__).parents[1]), environment.get("PYTHONPATH")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
