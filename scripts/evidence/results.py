"""What the experiments measured: one JSON file an experiment, filled unit by unit, by several processes if need be.

An entry is stored under its key as soon as it is measured, with what it was measured on. A second start skips what is there, so
that a run may end at any time and go on later, on another machine too.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import torch

from scripts.arguments import new_parser
from scripts.paths import DOCS

FOLDER = DOCS / "evidence"
Entry = dict[str, Any]
"""What was measured, `settings` it was measured with, `seconds` and `machine`."""


class Results(Mapping[str, Entry]):
    """The entries of one experiment by key; reading sees what other processes stored."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def entries(self) -> dict[str, Entry]:
        """All of it, read once."""
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}

    def __getitem__(self, key: str) -> Entry:
        return self.entries()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries())

    def __len__(self) -> int:
        return len(self.entries())

    def put(self, key: str, entry: Entry) -> None:
        """Store an entry, written whole or not at all; an older one of the key is replaced."""
        with self._locked():
            entries = self.entries() | {key: entry}
            partial = self.file.with_name(f"{self.file.name}.{os.getpid()}")
            # An entry a line: differences and merges of two runs stay readable.
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries))
            partial.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
            partial.replace(self.file)

    def merge(self, other: Results) -> None:
        """Take over the entries of another file that this one lacks."""
        for key in other.entries().keys() - self.entries().keys():
            self.put(key, other[key])

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # The folder's own lock: the file is replaced, and one for the lock alone would stay behind.
        folder = os.open(self.file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def machine(device: torch.device | str) -> dict[str, str]:
    """What an entry was measured on: device and versions."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    about = {"device": name, "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        import triton

        about["triton"] = triton.__version__
    return about


def command_line(experiment: str, file: str, description: str) -> argparse.ArgumentParser:
    """The options that all experiments have; `experiment` is the name of its module, `file` that of its results."""
    parser = new_parser(f"scripts.evidence.{experiment}", description)
    parser.add_argument("--results", type=Path, default=FOLDER / file, help="default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side; default %(default)s")
    parser.add_argument("--seconds", type=float, help="start no more units after so long; default: finish all")
    return parser


Measure = Callable[[Any], Entry]
"""Measures one unit, given its settings."""


def work_through(
    results: Results,
    units: Callable[[dict[str, Entry]], Iterable[tuple[str, Any]]],
    prepare: Callable[[], Measure],
    *,
    device: str,
    workers: int = 1,
    seconds: float | None = None,
) -> None:
    """Measure all units that have no entry yet, the most important first, and store each as soon as it is done.

    Args:
        results: where entries go.
        units: keys and settings in the order of importance, given the entries so far; asked again after every entry, so that
            units may follow from the results of others.
        prepare: called once in each worker; returns what measures a unit. It and the settings have to be picklable.
        device: where it runs, for the record.
        workers: processes side by side, spread over the GPUs there are; with 1 it runs in this one.
        seconds: after so many no more units are started; those that run are finished.

    Raises:
        RuntimeError: units failed; the message has the first error. The others were measured all the same.
    """
    began = time.monotonic()
    failed: dict[str, BaseException] = {}

    def next_unit(running: Iterable[str]) -> tuple[str, Any] | None:
        if seconds is not None and time.monotonic() - began > seconds:
            return None
        entries = results.entries()
        skip = {*entries, *running, *failed}
        return next(((key, settings) for key, settings in units(entries) if key not in skip), None)

    def done(key: str, entry: Callable[[], Entry]) -> None:
        try:
            results.put(key, measured := entry())
            print(f"[{time.monotonic() - began:6.1f} s] {key}: {measured['seconds']:.1f} s", flush=True)
        except Exception as error:
            failed[key] = error
            print(f"[{time.monotonic() - began:6.1f} s] {key} FAILED: {error!r}", flush=True)

    if workers == 1:
        measure = None
        while (unit := next_unit(())) is not None:
            key, settings = unit
            measure = measure or prepare()
            done(key, lambda measure=measure, settings=settings: _measured(measure, settings, device))
    else:
        context = multiprocessing.get_context("spawn")
        started = context.Value("i", 0)
        with ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(prepare, started)) as pool:
            running: dict[Future, str] = {}
            while True:
                while len(running) < workers and (unit := next_unit(running.values())) is not None:
                    running[pool.submit(_in_worker, unit[1], device)] = unit[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    done(running.pop(future), future.result)
    entries = results.entries()
    left = [key for key, _ in units(entries) if key not in entries]
    if left:
        print(f"not measured yet: {', '.join(left)}", flush=True)
    if failed:
        key, error = next(iter(failed.items()))
        raise RuntimeError(f"{len(failed)} units failed, the first is {key}: {error!r}") from error


_measure: Measure | None = None
"""Of a worker process."""


def start_worker(prepare: Callable[[], Measure], started: Synchronized[int]) -> None:
    """What a worker process does first: take a GPU of its own, and prepare."""
    global _measure
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    _measure = prepare()


def _in_worker(settings: Any, device: str) -> Entry:
    return _measured(_measure, settings, device)


def _measured(measure: Measure, settings: Any, device: str) -> Entry:
    began = time.monotonic()
    entry = measure(settings)
    return entry | {"seconds": round(time.monotonic() - began, 2), "machine": machine(device)}
