"""Training at length: what is run when, what fits into the time that is left, and the text."""

import dataclasses
import math
import time

import pytest

from scripts.evidence import documents, length
from scripts.evidence.trained import ALL, PLAIN, Run


def entries_of(best: dict[str, float]) -> tuple[list[Run], dict]:
    """What a plan comes to if each method is best at one learning rate."""
    entries, order = {}, []
    while (unit := next(((key, unit) for key, unit in length.plan(entries) if key not in entries), None)) is not None:
        key, run = unit
        entries[key] = {"settings": {}}
        if isinstance(run, Run):
            worse = abs(math.log(run.rate / best.get(run.method, 3e-4)))
            curve = {f"{name}_{where}": worse for name in ("loss", "kl") for where in ("original", PLAIN, ALL)}
            settings = dataclasses.asdict(run) | dataclasses.asdict(length.SIZES[run.size])
            entries[key] = {"curve": [curve], "seconds": 60.0, "settings": settings}
            order.append(run)
    return order, entries


def test_learning_rates_are_swept_first_and_all_other_runs_take_the_best():
    best = {"task": 1e-4, "control": 1e-3, "distill": 3e-5}
    order, _ = entries_of(best)
    assert [(run.method, run.option) for run in order[:3]] == [("control", ALL), ("task", ALL), ("distill", ALL)]
    tried = {run.rate for run in order if run.method == "task" and run.option == ALL and run.size == length.SHORT}
    assert tried == {3e-5, 1e-4, 3e-4}, "until both neighbours of the best are worse"
    order_of = [run for run in order if run.weights == "full" and run.method in best]
    swept = sum(run.seed == 0 and run.size == length.SHORT and run.option == ALL for run in order_of)
    rest = order_of[swept:]
    assert all(run.rate == best[run.method] for run in rest) and {run.size for run in rest} == set(length.SIZES) - {"main"}
    assert [(run.size, run.seed) for run in order if (run.method, run.option) == ("task", PLAIN) and run.weights == "full"] == [
        (size, seed) for size in (length.SHORT, length.LONG) for seed in (0, 1, 2)
    ]
    assert {run.seed for run in order if run.size == length.LONGEST} == {0, 1, 2}
    assert len({run.key for run in order}) == len(order)


def test_a_method_whose_sweep_goes_on_is_not_run_at_a_rate_that_may_change():
    _, entries = entries_of({})
    late = Run(method="task", option=ALL, size=length.SHORT, rate=1e-3, seed=0).key
    del entries[late]
    for key in [key for key, entry in entries.items() if entry["settings"].get("seed") == 1]:
        del entries[key]
    missing = [(key, run) for key, run in length.plan(entries) if key not in entries]
    assert missing[0][0] == late
    assert {run.method for _, run in missing[1:] if run.weights == "full"} == {"control", "distill", "mix"}


def test_runs_that_would_be_cut_are_not_started():
    assert len(list(length.fitting({}, time.monotonic() + 9))) > 1, "nothing is known yet"
    _, entries = entries_of({})
    for key, entry in list(entries.items()):
        if entry["settings"].get("size") == length.SHORT:
            entry["seconds"] = {"control": 25.0, "task": 50.0, "distill": 75.0}.get(entry["settings"]["method"], 10.0)
        elif entry["settings"]:
            del entries[key]

    def fits(seconds: float) -> set[tuple[str, str]]:
        units = [unit for key, unit in length.fitting(entries, time.monotonic() + seconds) if key not in entries]
        return {(unit.method, unit.size) for unit in units if unit.method in ("control", "task", "distill")}

    assert fits(20) == set()
    assert fits(110) == {("control", length.LONG)}, "as long as 500 steps take, four times"
    assert fits(250) == {("control", length.LONG), ("task", length.LONG)}
    slow = Run(method="control", option=ALL, size=length.LONG, rate=3e-4, seed=0)
    entries[slow.key] = {"settings": dataclasses.asdict(slow) | {"steps": 2000}, "curve": [], "seconds": 240.0}
    entries[slow.key]["curve"] = [{"loss_original": 1.0, "kl_original": 0.0}]
    assert fits(230) == {("task", length.LONG)}, "runs of this length say more"
    assert not list(length.fitting(entries, time.monotonic() - 1))


def test_documents_are_read_without_markup_and_held_out_whole(tmp_path):
    words = [f"word{i}" for i in range(3000)]
    for number in range(160):
        doc = tmp_path / "usr" / "share" / "doc" / f"package{number % 4}" / f"{number}.html"
        doc.parent.mkdir(parents=True, exist_ok=True)
        body = " ".join(f"{word}-{number}" for word in words[:600])
        doc.write_text(f"<html><head><title>no</title></head><nav>no</nav><p>&lt;{body}&gt;</p></html>")
    (doc.parent / "_sources").mkdir()
    (doc.parent / "_sources" / "source.txt").write_text("word " * 3000)
    found = dict(documents.documents(tmp_path))
    assert len(found) == 160 and all(text.startswith("<word0-") and text.endswith(">") for text in found.values())
    parts = documents.split(found.items())
    assert sum(map(len, parts.values())) == 160 and min(map(len, parts.values())) > 0
    # Of what is held out nothing much may stand in a text to train on.
    held = next(iter(parts["test"].values()))
    twins = [(str(number), f"Copy {number}. {held}") for number in range(20)]
    again = documents.split([*found.items(), *twins])
    assert any(held in text for text in again["train"].values())
    assert not any(held in text for part in ("test", "validation") for text in again[part].values())
    with pytest.raises(ValueError, match="expected unpacked packages with documentation, and there is none"):
        (tmp_path / "model").mkdir()
        documents.prepare(tmp_path, tmp_path / "model", gguf=tmp_path / "none.gguf")
