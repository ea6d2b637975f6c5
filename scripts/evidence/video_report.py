"""Tables and figure of the experiments on video, from their JSON alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from results import Entry

Results = Mapping[str, Entry]
Value = tuple[float, float]
"""A mean and its error."""
MEASURES = ("extra loss", "velocity error", "PSNR, dB", "SSIM", "motion")
METHODS = ("distill", "mix", "task", "control")


def of_samples(values: Sequence[float]) -> Value:
    """Mean and standard error of independent values; of a single one the error is unknown."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def ratio(values: Sequence[float], reference: Sequence[float]) -> Value:
    """Ratio of the means of pairs, and its standard error to first order."""
    mean = sum(reference) / len(reference)
    found = sum(values) / len(values) / mean
    return found, of_samples([(x - found * y) / mean for x, y in zip(values, reference, strict=True)])[1]


def compared(measured: Mapping[str, Sequence[float]], original: Mapping[str, Sequence[float]]) -> dict[str, Value]:
    """MEASURES of one model against the starting model in original attention, paired; errors over items and samples."""
    differences = [ours - theirs for ours, theirs in zip(measured["loss"], original["loss"], strict=True)]
    values = [of_samples(x) for x in (differences, measured["velocity_error"], measured["psnr"], measured["ssim"])]
    return dict(zip(MEASURES, (*values, ratio(measured["motion"], original["motion"])), strict=True))


def untrained_rows(untrained: Results) -> dict[str, dict[str, Value]]:
    """Of each attention that was measured, by name: MEASURES; the one with the smallest velocity error comes first."""
    original = untrained["original"]["test"]
    rows = {name: compared(entry["test"], original) for name, entry in untrained.items() if "test" in entry}
    return dict(sorted(rows.items(), key=lambda row: row[1]["velocity error"]))


def trained_rows(untrained: Results, trained: Results) -> dict[str, dict[str, Value]]:
    """MEASURES of each method, means over seeds at the learning rate that was run with the most of them, and its standard error.

    `extra loss` is here that over the control in original attention of the same seed; the other measures are against the
    starting model in original attention.
    """
    start = untrained["original"]["test"]
    rows, best = {}, {}
    for entry in trained.values():
        run = entry["settings"]
        best.setdefault((run["method"], run["attention"]), {}).setdefault(run["rate"], {})[run["seed"]] = entry["test"]
    seeds_of = {key: max(rates.items(), key=lambda rate: len(rate[1])) for key, rates in best.items()}
    if ("control", "nvfp4") not in seeds_of:
        return {}
    controls = {seed: test["original"] for seed, test in seeds_of["control", "nvfp4"][1].items()}
    for (method, _), (rate, seeds) in sorted(seeds_of.items(), key=lambda item: (item[0][1], METHODS.index(item[0][0]))):
        for served in next(iter(seeds.values())):
            runs = []
            for seed, test in seeds.items():
                if seed in controls:
                    values = {name: value for name, (value, _) in compared(test[served], start).items()}
                    extra = compared(test[served], controls[seed])["extra loss"][0]
                    runs.append(values | {"extra loss": extra})
            if runs:
                name = f"{method} at {rate:g}, in {served}, {len(runs)} seeds"
                rows[name] = {measure: of_samples([run[measure] for run in runs]) for measure in MEASURES}
    return rows


def table(rows: Mapping[str, Mapping[str, Value]], first: str) -> str:
    """Rows as a table in Markdown; losses and velocity errors are in thousandths."""
    lines = [f"| {first} | extra loss, 10⁻³ | velocity error, 10⁻³ | PSNR, dB | SSIM | motion |", "|---|---|---|---|---|---|"]
    digits = {"extra loss": (1e3, 2), "velocity error": (1e3, 2), "PSNR, dB": (1, 1), "SSIM": (1, 3), "motion": (1, 3)}
    for name, row in rows.items():
        cells = []
        for measure, (factor, places) in digits.items():
            value, error = (factor * x for x in row[measure])
            cells.append(f"{value:.{places}f}" + ("" if math.isnan(error) else f" ± {error:.{places}f}"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def clips_motion(untrained: Results) -> dict[str, float]:
    """Motion of the real clips by split, relative to that of the starting model's samples in original attention."""
    samples = of_samples(untrained["original"]["test"]["motion"])[0]
    return {split: of_samples(values)[0] / samples for split, values in untrained["clips"]["motion"].items()}


def figure(untrained: Results, trained: Results, file: Path) -> None:
    """Velocity error of every attention, and velocity error, extra loss and motion of every method, as a picture."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 8), layout="constrained")
    (a, b), (c, d) = picture.subplots(2, 2)
    start, methods = untrained_rows(untrained), trained_rows(untrained, trained)
    start.pop("original")
    all_rows = {f"untrained, in {name}": start[name] for name in ("nvfp4", "sage3") if name in start} | methods
    panels = (
        (a, start, "velocity error", 1e3, "before training: velocity error, 10⁻³"),
        (b, all_rows, "velocity error", 1e3, "velocity error to the starting model, 10⁻³"),
        (c, all_rows, "extra loss", 1e3, "held-out loss over the control's (untrained: the starting model's), 10⁻³"),
        (d, all_rows, "motion", 1, "motion of samples, relative to the starting model's"),
    )
    for axes, rows, measure, factor, title in panels:
        values = [[factor * x for x in row[measure]] for row in rows.values()]
        errors = [0 if math.isnan(error) else error for _, error in values]
        axes.barh(list(rows), [value for value, _ in values], xerr=errors, color="tab:blue", ecolor="black", capsize=2)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    d.axvline(1, color="black", linewidth=0.8)
    picture.savefig(file, dpi=110)
