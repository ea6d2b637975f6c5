"""docs/evidence/*.md say what the JSON says, and its statistics are right on numbers that are known."""

import json
import math

import pytest

from scripts.evidence.estimates import Estimate, difference, estimate, ratio, share
from scripts.evidence.report import document as report
from scripts.evidence.report import servers as report_servers
from scripts.evidence.report import trained as report_trained
from scripts.evidence.results import FOLDER, Results
from scripts.evidence.servers import CACHE
from scripts.evidence.trained import RATES


def test_the_documents_are_fresh():
    documents = report.read(FOLDER)
    assert documents == report.render(documents, report.load(FOLDER)), "run make evidence"


def test_a_changed_number_makes_a_document_stale(tmp_path):
    results = Results(tmp_path / "trained.json")
    test = {"loss_original": [3.0, 5.0]}
    test |= {f"{name}_{option}": [4.0, 6.5] for option in report_trained.OPTIONS for name in ("loss", "kl", "between")}
    results.put("untrained/main", {"test": test, "machine": {"device": "X", "torch": "2"}})
    documents = report.render(report.read(FOLDER), report.load(tmp_path))
    text = documents[FOLDER / "trained.md"]
    assert "| untrained | 4.0000 ± 1.0000 | 5.2500 ± 1.2500 | +1.2500 ± 0.2500 | 1.00 ± 0.00 |" in text
    assert "| `untrained/main` |" in text and "Measured on X, torch 2." in text
    assert documents == report.render(documents, report.load(tmp_path))
    test["loss_nvfp4"] = [4.0, 6.6]
    results.put("untrained/main", {"test": test, "machine": {"device": "X", "torch": "2"}})
    assert documents != report.render(documents, report.load(tmp_path))


def test_tables_that_nobody_makes_are_refused():
    documents = report.read(FOLDER)
    documents[FOLDER / "serve.md"] = documents[FOLDER / "serve.md"].replace("<!-- table serve -->", "<!-- table served -->")
    with pytest.raises(ValueError, match=r"expected each of the tables .*'serve'"):
        report.render(documents, report.load(FOLDER))


def test_errors_of_windows_and_seeds():
    one_seed = estimate([[1.0, 2.0, 3.0, 6.0]])
    assert one_seed.mean == 3.0
    assert one_seed.error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    # Seeds that agree add nothing to the error over windows; windows that agree add nothing to that over seeds.
    assert estimate([[1.0, 2.0, 3.0, 6.0]] * 3).error == pytest.approx(one_seed.error)
    assert estimate([[1.0, 1.0], [2.0, 2.0], [6.0, 6.0]]) == pytest.approx((3.0, math.sqrt((4 + 1 + 9) / 2 / 3)))
    both = estimate([[0.0, 2.0], [4.0, 6.0]])
    assert both == pytest.approx((3.0, math.hypot(2.0, 1.0)))
    assert math.isnan(estimate([[5.0]]).error) and str(estimate([[5.0]])) == "5.0000"


def test_differences_are_paired():
    ours, theirs = [[10.0, 20.0], [11.0, 21.0]], [[9.0, 19.0], [10.5, 20.5]]
    assert difference(ours, theirs) == [[1.0, 1.0], [0.5, 0.5]]
    assert difference(ours, [[9.0, 19.0]]) == [[1.0, 1.0], [2.0, 2.0]]
    assert estimate(difference(ours, theirs)).error == pytest.approx(0.25)  # though the windows are 10 apart
    for wrong in ([[9.0]], [[9.0, 19.0]] * 3):
        with pytest.raises(ValueError, match="expected the same seeds and windows on both sides, got 2 x 2 and"):
            difference(ours, wrong)


def test_shares_and_signs():
    # A third of a gap in every window has no error, however much windows differ.
    assert ratio([[1.0, 2.0, 3.0]], [3.0, 6.0, 9.0]) == pytest.approx((1 / 3, 0.0))
    assert share([[0.05]], [0.125]) == "0.40"
    # The ratio is a half; left over by window, as parts of the mean of 3: (0.5 - 1) / 3 and (2.5 - 2) / 3.
    mean, error = ratio([[0.5, 2.5]], [2.0, 4.0])
    assert (mean, error) == pytest.approx((0.5, math.sqrt(2 * (0.5 / 3) ** 2 / 1 / 2)))
    assert ratio([[1.0, 2.0], [3.0, 6.0]], [1.0, 2.0]) == pytest.approx(
        (3.0 * 4 / 6, estimate([[-2 / 3, -4 / 3], [2 / 3, 4 / 3]]).error)
    )
    assert share([[1.0, 1.0]], [-1.0, 0.5]) == ""
    assert Estimate(0.05, 0.01).signed() == "+0.0500 ± 0.0100" and Estimate(-0.05, 0.01).signed() == "-0.0500 ± 0.0100"


def test_seeds_without_control_are_left_out_and_named(tmp_path):
    results = Results(tmp_path / "trained.json")
    machine = {"machine": {"device": "X", "torch": "2"}}

    def test_of(loss):
        found = {"loss_original": [2.0, 4.0]}
        return found | {f"{name}_{o}": [loss, loss + 2.1] for o in report_trained.OPTIONS for name in ("loss", "kl", "between")}

    results.put("untrained/main", machine | {"test": test_of(3.0)})
    for method, seeds in (("control", (0,)), ("task", (0, 2))):
        for rate, value in ((3e-5, 2.0), (1e-4, 1.0), (3e-4, 2.0)):
            for seed in seeds if rate == 1e-4 else (0,):
                run = report_trained.Run(method=method, rate=rate, seed=seed)
                curve = [{f"{name}_{where}": value for name in ("loss", "kl") for where in ("original", "nvfp4")}]
                # The seed without control is far off: it must not count.
                entry = {"curve": curve, "test": test_of(2.5 if seed == 0 else 99.0), "settings": {"rate": rate}}
                results.put(run.key, machine | entry)
    table = report_trained.TABLES["trained-methods"](report.load(tmp_path))
    (row,) = [line for line in table.splitlines() if line.startswith("| task, full")]
    assert "| +0.5500 ± 0.0500 | 0.52 ± 0.02 |" in row and "| 1 (2 without control) |" in row and "seed=0`" in row
    assert "*Not measured yet: distill, full; mix, full; control_mix, full; control, lora;" in table
    assert report_trained.TABLES["trained-steps"](report.load(tmp_path)) == ""


def test_figures_are_drawn(tmp_path):
    results = Results(tmp_path / "trained.json")
    curve = [{"step": step, "loss_original": 3.0, "loss_nvfp4": 3.1, "kl_nvfp4": 0.1, "kl_original": 0.0} for step in (0, 10)]
    for rate in RATES["full"]:
        run = report_trained.Run(method="task", rate=rate, seed=0)
        loss = 3.0 + abs(math.log(rate / 1e-4))
        results.put(run.key, {"curve": [*curve, {**curve[-1], "step": 20, "loss_nvfp4": loss}]})
    report_trained.FIGURES["trained-curves"](report.load(tmp_path), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (chosen,) = report_trained.runs(results.entries(), "task").values()
    assert chosen == json.loads(json.dumps(results["main/full/task/nvfp4/rate=0.0001/seed=0"]))


def test_the_cost_of_the_cache_is_each_models_own(tmp_path):
    results, machine = Results(tmp_path / "servers_language.json"), {"machine": {"device": "GPU 9", "torch": "2"}}

    def put(key, original, served):
        found = {f"loss_{CACHE}": served, f"kl_{CACHE}": served, f"between_{CACHE}": served, "loss_original": original}
        curve = dict.fromkeys(("loss_original", "kl_original", f"loss_{CACHE}", f"kl_{CACHE}"), served[0])
        results.put(key, machine | {"test": found, "curve": [curve]})

    put("untrained/main", [3.0, 5.0], [3.3, 5.5])
    draw = report_servers.FIGURES[report_servers.COST]
    draw(report.load(tmp_path), tmp_path / "cost.png")
    assert not (tmp_path / "cost.png").exists()
    for method in ("control", "distill", "task"):
        for rate in RATES["full"]:
            for seed in (0, 1) if rate == 1e-4 else (0,):
                run = report_trained.Run(method=method, option=CACHE, rate=rate, seed=seed)
                put(run.key, [2.0, 4.0], [2.1 + (rate != 1e-4) + seed, 4.1 + (rate != 1e-4) + seed])
    costs = report_servers.costs_of_the_cache(report.load(tmp_path))
    assert [round(each.mean, 6) for each in costs.values()] == [0.4, 0.6, 0.6, 0.6]
    assert next(iter(costs)) == "not trained" and len(costs) == 4
    draw(report.load(tmp_path), tmp_path / "cost.png")
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert f"({report_servers.COST}.png)" in report_servers.TABLES["servers_language"](report.load(tmp_path))
