"""scripts.evidence.results: nothing is measured twice, nothing is lost, and workers fill one file together."""

import json
import multiprocessing
import os
import time
from functools import partial

import pytest

from scripts.evidence.results import Results, start_worker, work_through


def prepare(log, fail=(), workers=1):
    """A measurement that leaves a line in `log`; pickled to worker processes. It waits until all of them have started."""

    def measure(settings):
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{settings} {os.getpid()}\n")
        if settings in fail:
            raise ValueError(f"cannot measure {settings}")
        time.sleep(0.05)
        deadline = time.monotonic() + 60
        while len({line.split()[1] for line in log.read_text().splitlines()}) < workers and time.monotonic() < deadline:
            time.sleep(0.05)
        return {"value": settings * 10}

    return measure


def units(count, results):
    return [(f"unit/{n}", n) for n in range(count)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_is_measured_once(tmp_path, workers):
    results, log = Results(tmp_path / "docs" / "x.json"), tmp_path / "log"
    results.put("unit/1", {"value": "of an earlier run"})
    work_through(results, partial(units, 6), partial(prepare, log, workers=workers), device="cpu", workers=workers)
    measured = [line.split() for line in log.read_text().splitlines()]
    assert sorted(int(n) for n, _ in measured) == [0, 2, 3, 4, 5]
    assert results["unit/1"] == {"value": "of an earlier run"} and results["unit/4"]["value"] == 40
    assert len({pid for _, pid in measured} - {str(os.getpid())}) == (0 if workers == 1 else 2)
    assert results["unit/0"]["machine"]["device"].startswith("CPU") and results["unit/0"]["seconds"] >= 0.05
    assert [file.name for file in results.file.parent.iterdir()] == ["x.json"]
    work_through(results, partial(units, 6), partial(prepare, log), device="cpu", workers=workers)
    assert len(log.read_text().splitlines()) == len(measured)


def test_workers_are_spread_over_the_gpus(monkeypatch):
    taken = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", taken.append)
    started = multiprocessing.Value("i", 0)
    for _ in range(3):
        start_worker(lambda: None, started)
    assert taken == [0, 1, 0]


def test_units_follow_from_results(tmp_path):
    """The second unit is only known when the first is measured; and no time is left for a third."""
    results, log = Results(tmp_path / "x.json"), tmp_path / "log"

    def plan(results):
        yield "first", 1
        if "first" in results:
            yield "second", results["first"]["value"]

    work_through(results, plan, partial(prepare, log), device="cpu")
    assert results["second"]["value"] == 100
    work_through(results, partial(units, 3), partial(prepare, log), device="cpu", seconds=-1)
    assert set(results) == {"first", "second"}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_is_reported_and_other_units_still_run(tmp_path, workers):
    results, log = Results(tmp_path / "x.json"), tmp_path / "log"
    with pytest.raises(RuntimeError, match=r"1 units failed, the first is unit/1: .*cannot measure 1"):
        work_through(results, partial(units, 4), partial(prepare, log, fail=(1,)), device="cpu", workers=workers)
    assert set(results) == {"unit/0", "unit/2", "unit/3"}


def test_files_of_two_machines_are_merged(tmp_path):
    ours, theirs = Results(tmp_path / "a.json"), Results(tmp_path / "b.json")
    ours.put("x", {"value": 1})
    theirs.put("x", {"value": 2})
    theirs.put("y", {"value": 3})
    ours.merge(theirs)
    assert json.loads(ours.file.read_text()) == {"x": {"value": 1}, "y": {"value": 3}}
    assert ours.file.read_text().count("\n") == 4, "an entry a line"
