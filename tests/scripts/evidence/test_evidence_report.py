"""The documents say what the JSON says, and its statistics are right on numbers that are known."""

import json
import math
import re

import pytest

from scripts.bench import sizing_report
from scripts.evidence.estimates import Estimate, difference, estimate, ratio, share
from scripts.evidence.length import Q_SHIFT
from scripts.evidence.report import advice as report_advice
from scripts.evidence.report import document as report
from scripts.evidence.report import length as report_length
from scripts.evidence.report import servers as report_servers
from scripts.evidence.report import several_gpus as report_several_gpus
from scripts.evidence.report import speed as report_speed
from scripts.evidence.report import summary as report_summary
from scripts.evidence.report import trained as report_trained
from scripts.evidence.results import FOLDER, Results
from scripts.evidence.servers import CACHE
from scripts.evidence.trained import ALL, PLAIN, RATES
from scripts.paths import DOCS, ROOT

ALL_UNTRAINED = "nvfp4+rotate+four_over_six+k_shift"


def test_the_documents_are_fresh():
    documents = report.read()
    assert documents == report.render(documents, report.load(FOLDER)), "run make evidence"


def test_the_claims_of_the_readme_are_measured():
    results = report.load(FOLDER)
    cache = {name: cost.mean for name, cost in report_servers.costs_of_the_cache(results).items()}
    untrained = {name: estimate([results("untrained_language")[name]["kl"]]).mean for name in ("nvfp4", ALL_UNTRAINED)}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split("## Install")[0].split())
    assert f"loses {cache['fine-tuned without the cache']:.3f} nats per token" in text
    assert f"and {cache['fine-tuned through the cache']:.3f} after" in text
    assert f": {cache['not trained']:.3f} nats untrained" in text
    assert f"falls from {untrained['nvfp4']:.3f} to {untrained[ALL_UNTRAINED]:.3f}" in text


def test_the_claims_of_the_readme_about_speed_are_measured():
    times: dict[tuple, dict[str, float]] = {}
    for each in report_speed.measurements("h200_attention"):
        if each["what"] == "forward+backward" and each["block_size"] == 1:
            shape = tuple(each[name] for name in ("heads", "queries", "keys", "head_dim", "causal", "packed", "window"))
            times.setdefault(shape, {})[each["name"]] = each["seconds"][1]
    flash = [row["ours"] / row.get("sdpa flash", row.get("varlen_attn")) for row in times.values()]
    cudnn = [row["ours"] / row["sdpa cudnn"] for row in times.values() if "sdpa cudnn" in row]
    decoded = {each["name"]: each for each in report_speed.measurements("h200_decode") if each["batch"] == 32}
    ours, theirs = decoded["fp4 cache"], decoded["bf16 sdpa cudnn"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"takes {min(flash):.2f} to {max(flash):.2f} of FlashAttention-2's time" in text
    assert f"and {min(cudnn):.1f} to {max(cudnn):.1f} times that of cuDNN's" in text
    benchmarks = " ".join((DOCS / "BENCHMARKS.md").read_text(encoding="utf-8").split())
    assert f"take {min(cudnn):.2f} to {max(cudnn):.2f} times cuDNN's time" in benchmarks
    assert ours["length"] == theirs["length"] == 32_768
    assert f"takes {ours['bytes'] / theirs['bytes']:.2f} of BF16's memory" in text
    assert f"decodes {theirs['ms'] / ours['ms']:.1f} times as fast" in text


def test_the_claims_about_several_gpus_are_measured():
    extra = {model: f"{100 * report_several_gpus.extra_time(model):.0f} %" for model in ("qwen3-14b-fsdp2", "wan-14b-ulysses")}
    for name in ("README.md", "docs/BENCHMARKS.md"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split())
        words = re.search(r"4-bit attention adds (\d+ %) to a step of Qwen3 14B .*? and (\d+ %) to one of Wan 2.1 14B", text)
        assert words and words.groups() == tuple(extra.values()), name


def test_a_changed_time_makes_the_tables_of_speed_stale(monkeypatch):
    documents, measurements = report.read(), report_speed.measurements
    monkeypatch.setattr(report_speed, "measurements", lambda file: [each | {"seconds": [9.0] * 3} for each in measurements(file)])
    rendered = report.render(documents, report.load(FOLDER))
    assert {path.name for path in documents if rendered[path] != documents[path]} == {"README.md", "BENCHMARKS.md"}


def test_a_changed_run_makes_the_tables_of_several_gpus_stale(monkeypatch):
    stored = report_several_gpus.stored

    def changed(file):
        found = stored(file)
        if file == report_several_gpus.RECIPES:
            found["small"]["qwen3 ddp"][0]["eval_loss_fp4"] *= 1.5
        return found

    monkeypatch.setattr(report_several_gpus, "stored", changed)
    documents = report.read()
    benchmarks = report.render(documents, report.load(FOLDER))[DOCS / "BENCHMARKS.md"]
    assert "| Qwen3, DDP | one GPU | 0 | 5.0e-1, 0 |" in benchmarks


def test_a_changed_file_of_memory_makes_sizing_stale(tmp_path, monkeypatch):
    memory = sizing_report.measured()
    found = json.loads(memory.read_text(encoding="utf-8"))
    found["about"]["device"] = "NVIDIA X"
    (tmp_path / memory.name).write_text(json.dumps(found), encoding="utf-8")
    monkeypatch.setattr(sizing_report, "measured", lambda: tmp_path / memory.name)
    documents = report.read()
    rendered = report.render(documents, report.load(FOLDER))
    assert [path.name for path in documents if rendered[path] != documents[path]] == ["SIZING.md"]


def test_a_changed_number_makes_a_document_stale():
    stored, documents = report.load(FOLDER), report.read()

    def changed(name):
        entries = stored(name)
        if name != "trained":
            return entries
        before = entries["untrained/main"]
        losses = [loss + 1.0 for loss in before["test"]["loss_nvfp4"]]
        return entries | {"untrained/main": before | {"test": before["test"] | {"loss_nvfp4": losses}}}

    rendered = report.render(documents, changed)
    stale = {path.name for path in documents if rendered[path] != documents[path]}
    assert stale == {"README.md", "EVIDENCE.md", "trained.md"}
    assert rendered == report.render(rendered, changed)


def test_a_row_of_a_table(tmp_path):
    results = Results(tmp_path / "trained.json")
    test = {"loss_original": [3.0, 5.0]}
    test |= {f"{name}_{option}": [4.0, 6.5] for option in report_trained.OPTIONS for name in ("loss", "kl", "between")}
    results.put("untrained/main", {"test": test, "machine": {"device": "X", "torch": "2"}})
    text = report_trained.TABLES["trained-methods"](report.load(tmp_path))
    assert "| untrained | 4.0000 ± 1.0000 | 5.2500 ± 1.2500 | +1.2500 ± 0.2500 | 1.00 ± 0.00 |" in text
    assert "| `untrained/main` |" in text and "Measured on X, torch 2." in text


def test_tables_that_nobody_makes_are_refused():
    documents = report.read()
    serve = FOLDER / "serve.md"
    documents[serve] = documents[serve].replace("<!-- table serve -->", "<!-- table served -->")
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


def test_training_at_length_is_compared_with_controls_of_equal_steps(tmp_path):
    results, machine = Results(tmp_path / "length.json"), {"machine": {"device": "GPU 9", "torch": "2"}}

    def put(key, original, plain, options, q_shift=None):
        test = {"loss_original": original} | ({f"loss_{Q_SHIFT}": q_shift} if q_shift else {})
        for option, losses in ((PLAIN, plain), (ALL, options)):
            test |= {f"loss_{option}": losses, f"kl_{option}": [0.1, 0.2], f"between_{option}": [0.1, 0.2]}
        curve = {f"{name}_{where}": 1.0 for name in ("loss", "kl") for where in ("original", PLAIN, ALL)}
        results.put(key, machine | {"test": test, "curve": [curve]})

    put("untrained/main", [3.0, 5.0], [3.2, 5.4], [3.1, 5.1])
    first = report.load(tmp_path)
    table = report_length.TABLES["length-losses"](first)
    assert report_advice.long_quality(first("length")) == []
    assert table.count("not run") == 13 and "| 0 | untrained |" in table
    ((*_, advised, _, _, _),) = report_advice.advice_at_length(first("length"))
    assert advised == "not known yet" and report_length.TABLES["length-q-shift"](first) == ""

    for method, seeds, losses in (("control", (0, 1), ([2.0, 4.0], [2.2, 4.2], [2.12, 4.12])), ("task", (0,), None)):
        for seed in seeds:
            run = report_trained.Run(method=method, option=ALL, size="2000-steps", rate=3e-4, seed=seed)
            put(run.key, *(losses or ([2.01, 4.01], [2.1, 4.1], [2.04, 4.06])))
    # A seed without control says nothing against controls.
    lonely = report_trained.Run(method="task", option=ALL, size="2000-steps", rate=3e-4, seed=2)
    put(lonely.key, [2.01, 4.01], [9.0, 9.0], [9.0, 9.0])
    # Two shorter runs, which were measured with a mean of Q too, as the starting model now is.
    put("untrained/main", [3.0, 5.0], [3.2, 5.4], [3.1, 5.1], [3.05, 5.06])
    for method, losses in (
        ("control", ([2.5, 4.5], [2.7, 4.7], [2.62, 4.62], [2.55, 4.56])),
        ("task", ([2.51, 4.51], [2.65, 4.65], [2.62, 4.63], [2.56, 4.58])),
    ):
        put(report_trained.Run(method=method, option=ALL, size="500-steps", rate=3e-4, seed=0).key, *losses)
    last = report.load(tmp_path)
    rows = report_length.TABLES["length-losses"](last).splitlines()
    (task,) = [row for row in rows if row.startswith("| 2,000 | task, all three | 0.0003 (of 1) | 2 |")]
    assert "| +0.0500 ± 0.0100 | 0.17 ± " in task, "in 4 bits 0.05 above the control's original attention, of a gap of 0.3"
    assert "seed=0,2`" in task
    with_mean = [row.split(" | ")[1:] for row in report_length.TABLES["length-q-shift"](last).splitlines()[2:]]
    assert [row[0] for row in with_mean] == ["untrained", "control", "task, all three"], "older runs have no row"
    assert with_mean[2][4:7] == ["0.0600 ± 0.0100", "0.1250 ± 0.0050", "0.0700 ± 0.0100"] and with_mean[2][7].startswith(
        "0.23 ± "
    )
    shown = report_summary.TABLES["summary-length"](last)
    title = "trained through all three, served with all three and a calibrated mean of Q"
    assert f"| 500 | {title} | 1 | 0.0600 ± 0.0100 | 0.0700 ± 0.0100 | 0.23 ± " in shown and shown.count("mean of Q") == 3
    short, long = report_advice.advice_at_length(last("length"))
    assert short[0] == "a task, 500 steps" and short[2].startswith("fine-tune as you do") and "0.120 → 0.125" in short[4]
    assert long[2] == "train through the three options" and "0.120 → 0.050" in long[4] and "one seed" in long[4]
    assert long[3] == "0.010 nats in original attention"
    ((_, device, *quality, _),) = report_advice.long_quality(last("length"))
    assert device == "GPU 9" and quality == ["0.100", "0.120", "**0.050**"]
    assert "0.17 ± " in "".join(f"{value.mean:.2f} ± " for value, _ in report_advice.long_targets(last("length"), "task"))
    report_length.FIGURES[report_length.CURVES](last, tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG")
