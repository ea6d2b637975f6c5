"""Training at length: what is run when, what fits into the time that is left, and the text."""

import itertools
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
            entries[key] = {"curve": [curve], "seconds": 60.0, "settings": {"method": run.method, "steps": 500}}
            order.append(run)
    return order, entries


def test_every_length_is_swept_and_seeds_take_the_best():
    best = {"task": 1e-4, "control": 1e-3}
    order, _ = entries_of(best)
    assert [(run.method, run.option) for run in order[:4]] == list(length.FIRST), "the four that say most come first"
    assert {run.size for run in order[:4]} == {length.LONG}
    for (method, rate), size in itertools.product(best.items(), (length.SHORT, length.LONG)):
        seeds = [run for run in order if (run.method, run.size, run.weights) == (method, size, "full") and run.seed == 2]
        assert {run.rate for run in seeds} == {rate}
    tried = {run.rate for run in order if run.method == "task" and run.option == ALL and run.size == length.SHORT}
    assert tried == {3e-5, 1e-4, 3e-4}, "until both neighbours of the best are worse"
    assert {run.seed for run in order if run.size == length.LONGEST} == {0, 1, 2}
    assert len({run.key for run in order}) == len(order)


def test_runs_that_would_be_cut_are_not_started():
    run = Run(method="control", option=ALL, size=length.SHORT, rate=3e-4, seed=0)
    assert {unit.size for _, unit in length.fitting({}, time.monotonic() + 9) if isinstance(unit, Run)} == set(length.SIZES) - {
        "main"
    }
    paced = {
        run.key: {
            "curve": [{"loss_original": 1.0, "kl_original": 0.0}],
            "seconds": 50.0,
            "settings": {"method": "control", "steps": 500},
        }
    }
    sizes = {unit if isinstance(unit, str) else unit.size for _, unit in length.fitting(paced, time.monotonic() + 100)}
    assert sizes == {"main", length.SHORT}, "2,000 steps would take 200 s"
    assert not list(length.fitting(paced, time.monotonic() - 1))


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
