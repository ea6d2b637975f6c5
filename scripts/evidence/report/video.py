"""Tables and figures of the experiments on video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scripts.evidence.estimates import Estimate, Matrix, difference, estimate, ratio
from scripts.evidence.report.tables_and_figures import devices_of, figure, in_words, measured_on, picture, table

Results = Callable[[str], Mapping[str, dict[str, Any]]]
Measured = Mapping[str, Matrix]
"""By what was measured; a row a seed, a column an item or a sample."""
Row = dict[str, Estimate]

HEAD = ("extra loss, 10⁻³", "velocity error, 10⁻³", "PSNR, dB", "SSIM", "motion")
DEFINITION = "nvfp4"
BASELINES = {"distill": None, "mix": "control_mix", "task": "control", "control": "control", "control_mix": "control_mix"}
"""By method, the control that learned the same equally long in original attention; None is the starting model, since distillation
has nothing to learn in original attention."""


def compared(measured: Measured, start: Measured, baseline: Measured) -> Row:
    """What stands under HEAD.

    Args:
        measured: of one kind of model.
        start: of the starting model in original attention; motion is relative to it.
        baseline: what the loss is compared with, of the same seeds, or of one for all.
    """
    extra = estimate(difference(measured["loss"], baseline["loss"]))
    found = [_scaled(extra, 1e3), _scaled(estimate(measured["velocity_error"]), 1e3)]
    found += [estimate(measured["psnr"]), estimate(measured["ssim"]), ratio(measured["motion"], start["motion"][0])]
    return dict(zip(HEAD, found, strict=True))


def untrained_rows(entries: Mapping[str, dict[str, Any]]) -> dict[str, Row]:
    """Of each attention, by name; the smallest velocity error comes first."""
    if "original" not in entries:
        return {}
    start = _matrices([entries["original"]["test"]])
    rows = {name: compared(_matrices([entry["test"]]), start, start) for name, entry in entries.items() if "test" in entry}
    return dict(sorted(rows.items(), key=lambda item: item[1]["velocity error, 10⁻³"].mean))


def trained_rows(untrained: Mapping[str, dict[str, Any]], trained: Mapping[str, dict[str, Any]]) -> dict[str, Row]:
    """Of each method that has its baseline, by name, at the learning rate that was run with most seeds; the extra loss is that
    over the baseline in original attention, of the same seeds."""
    by_rate: dict[tuple[str, str], dict[float, dict[int, Any]]] = {}
    for entry in trained.values():
        run = entry["settings"]
        by_rate.setdefault((run["attention"], run["method"]), {}).setdefault(run["rate"], {})[run["seed"]] = entry["test"]
    most = {key: max(rates.items(), key=lambda rate: len(rate[1])) for key, rates in by_rate.items()}
    if "original" not in untrained:
        return {}
    start = _matrices([untrained["original"]["test"]])
    rows = {}
    for attention in sorted({attention for attention, _ in most}):
        for method, control in BASELINES.items():
            rate, tests = most.get((attention, method), (0.0, {}))
            _, controls = most.get((DEFINITION, control), (0.0, {}))
            seeds = sorted(tests if control is None else tests.keys() & controls)
            for served in tests[seeds[0]] if seeds else ():
                if served == "original" and attention != DEFINITION:
                    continue  # a control, measured in original attention once more
                measured = _matrices([tests[seed][served] for seed in seeds])
                baseline = start if control is None else _matrices([controls[seed]["original"] for seed in seeds])
                name = f"{method} at {rate:g}, in `{served}`, seeds: {len(seeds)}"
                rows.setdefault(name, compared(measured, start, baseline))
    return rows


def _matrices(tests: list[dict[str, list[float]]]) -> Measured:
    return {name: [test[name] for test in tests] for name in tests[0]}


def _scaled(value: Estimate, factor: float) -> Estimate:
    return Estimate(factor * value.mean, factor * value.error)


def _cells(row: Row) -> list[str]:
    digits = dict(zip(HEAD, (2, 2, 1, 4, 3), strict=True))
    return [f"{value.mean:.{digits[name]}f} ± {value.error:.{digits[name]}f}" for name, value in row.items()]


def _untrained(results: Results) -> str:
    entries = results("video_untrained")
    rows = [(f"`{name}`", *_cells(row)) for name, row in untrained_rows(entries).items() if name != "original"]
    text = table(("attention", *HEAD), rows)
    return text and f"{text}\n\n{measured_on(entries.values())} Keys in video_untrained.json are the names of the attentions."


def _trained(results: Results) -> str:
    untrained, trained = results("video_untrained"), results("video_trained")
    text = table(("method", *HEAD), [(name, *_cells(row)) for name, row in trained_rows(untrained, trained).items()])
    about = f"{measured_on(trained.values())} Keys in video_trained.json: METHOD/ATTENTION/rate=RATE/seed=SEED."
    return text and f"{text}\n\n{about}{picture('video', 'Velocity error of every method')}"


def _motion(results: Results) -> str:
    """Of the clips, beside samples by the starting model."""
    entries = results("video_untrained")
    if not {"original", "clips"} <= entries.keys():
        return ""
    samples = estimate([entries["original"]["test"]["motion"]]).mean
    clips = entries["clips"]["motion"].items()
    rows = [
        (f"clips, {split}", f"{estimate([values]).mean:.5f}", f"{estimate([values]).mean / samples:.3f}")
        for split, values in clips
    ]
    rows = [("samples of the starting model, `original`", f"{samples:.5f}", "1.000"), *rows]
    return table(("", "motion", "relative"), rows) + "\n\nKeys in video_untrained.json: `original`, `clips`."


def _draw(results: Results, file: Path) -> None:
    """Velocity error of every method; the other measures are in the table."""
    untrained = untrained_rows(results("video_untrained"))
    methods = trained_rows(results("video_untrained"), results("video_trained"))
    if not methods:
        return
    rows = {f"untrained, in {name}": untrained[name] for name in (DEFINITION, "sage3") if name in untrained} | methods
    caption = f"small Wan on three clips, with standard errors; {devices_of(results('video_trained').values())}"
    with figure(file, 1, caption=caption, width=9) as (axis,):
        values = [row[HEAD[1]] for row in rows.values()]
        axis.barh([_in_words(name) for name in rows], [x.mean for x in values], xerr=[x.error for x in values], capsize=2)
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(f"What training wins back on video: {HEAD[1]}", fontsize=10)


def _in_words(row: str) -> str:
    """A row of the tables above, for people: `distill at 3e-05, in `nvfp4`, seeds: 3`, or the name of an attention."""
    what, _, attention = row.replace("`", "").split(", seeds")[0].partition(", in ")
    method = "not trained" if what == "untrained" else in_words(what.partition(" at ")[0])
    return f"{method}; seen in {in_words(attention)}" if attention else method


TABLES = {"video-untrained": _untrained, "video-trained": _trained, "video-motion": _motion}
FIGURES = {"video": _draw}
