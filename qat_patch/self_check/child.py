"""Runs the self-check in a child process, which a wrong kernel may take down, and makes of its end what it means."""

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
"""What one case may take on average, compilers included; a kernel that hangs is killed after it."""
_RANK = frozenset(f"{of}{what}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE", "NAME"))
_MASTER = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_")
"""Variables that tell a process of others, by name and by how they begin: the child is alone."""


def results(device: str, cases: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the child says of each case, in order; of one that took it down, how. The others get another child.

    Args:
        device: such as `cuda:0`.
        cases: as `Case.to_dict` has them.

    Yields:
        For each case a dict with `case`, `state` (`passed`, `failed`, or `none` for no verdict) and `reason`.
    """
    left = list(cases)
    while left:
        request = json.dumps({"device": device, "cases": left})
        status: int | None
        try:
            # Where the package is: Python looks for modules in the working directory first, which may be anybody's.
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
            # Nobody said anything of this one, and no sentence before it explains the end.
            yield {"case": left.pop(0)} | _end(status, err)


def _said(out: bytes, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the child, which are about these cases in this order; others' output is passed over."""
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
    """The verdict on a case whose child ended without a word about it."""
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
