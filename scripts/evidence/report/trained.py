"""Tables and curves of experiment 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from scripts.evidence.estimates import Matrix, difference, estimate, share
from scripts.evidence.report.tables_and_figures import devices_of, figure, in_words, measured_on, picture, table
from scripts.evidence.trained import ALL, METHODS, OPTIONS, PLAIN, SEEDS, SIZES, Run, best_rate, tried_rates

Entries = dict[str, dict[str, Any]]
Load = Callable[[str], Entries]
Row = list[str]
"""Cells without the title."""
REFERENCE = {"task": "control", "mix": "control_mix"}
"""What equally long training makes of original attention. Distillation in original attention has nothing to learn: its reference
is the starting model."""
_HEAD = (
    "",
    "loss, original",
    "loss, FP4",
    "gap",
    "of the untrained gap",
    "FP4 above its own original",
    "KL, FP4",
    "of the untrained KL",
    "KL, FP4 to own",
    "seeds",
    "keys",
)


def runs(entries: Entries, method: str, **options: Any) -> dict[int, dict[str, Any]]:
    """The runs of a method at its learning rate, by seed."""
    rate = best_rate(entries, method, options.get("weights", "full"))
    if rate is None:
        return {}
    keys = {seed: Run(method=method, rate=rate, seed=seed, **options).key for seed in SEEDS}
    return {seed: entries[key] for seed, key in keys.items() if key in entries}


def row(entries: Entries, method: str, served: str | None = None, **options: Any) -> Row | None:
    """A method: losses, what is left of the gap and of the KL, and where to find it; `served`: in another option than trained.

    Only seeds that the reference has too; the cell of the seeds says which ones wait for it.
    """
    size, option = options.get("size", "main"), served or options.get("option", PLAIN)
    found, before = runs(entries, method, **options), entries.get(untrained_key(size))
    if not found or before is None:
        return None
    reference, seeds = [before["test"]["loss_original"]], str(len(found))
    if method != "distill":
        shared = {name: value for name, value in options.items() if name != "option"}
        equally_long = runs(entries, REFERENCE.get(method, method), **shared)
        waiting = [str(seed) for seed in found if seed not in equally_long]
        found = {seed: entry for seed, entry in found.items() if seed in equally_long}
        if not found:
            return None
        seeds = f"{len(found)} ({', '.join(waiting)} without control)" if waiting else str(len(found))
        reference = column(equally_long[seed] for seed in found)("loss_original")
    measured = column(found.values())
    settings = next(iter(found.values()))["settings"]
    key = Run(method=method, rate=settings["rate"], seed=0, **options).key.replace("seed=0", f"seed={','.join(map(str, found))}")
    return [*_cells(measured, reference, option, before), seeds, f"`{key}`"]


def column(entries: Iterable[dict[str, Any]]) -> Callable[[str], Matrix]:
    """What runs measured on test windows, by name."""
    tests = [entry["test"] for entry in entries]
    return lambda name: [test[name] for test in tests]


def _cells(measured: Callable[[str], Matrix], reference: Matrix, option: str, before: dict[str, Any]) -> list[str]:
    """Losses, gaps and KLs; shares are always of the starting model in plain NVFP4, for every option."""
    start = column([before])
    whole_gap, whole_kl = difference(start(f"loss_{PLAIN}"), start("loss_original"))[0], start(f"kl_{PLAIN}")[0]
    fp4, original, kl = measured(f"loss_{option}"), measured("loss_original"), measured(f"kl_{option}")
    gap, own_gap = difference(fp4, reference), difference(fp4, original)
    cells = [str(estimate(original)), str(estimate(fp4)), estimate(gap).signed(), share(gap, whole_gap)]
    cells += [estimate(own_gap).signed(), str(estimate(kl)), share(kl, whole_kl)]
    return [*cells, str(estimate(measured(f"between_{option}")))]


def untrained_key(size: str) -> str:
    """Where the starting model was measured on the test windows of a size: runs of other steps share those of `main`."""
    return f"untrained/{'long' if size == 'long' else 'main'}"


def untrained_row(entries: Entries, size: str, option: str = PLAIN) -> Row | None:
    """The starting model."""
    key = untrained_key(size)
    if key not in entries:
        return None
    measured = column([entries[key]])
    return [*_cells(measured, measured("loss_original"), option, entries[key]), "", f"`{key}`"]


def describe(option: str) -> str:
    """An option in words."""
    return {PLAIN: "plain", ALL: "all three"}.get(option, f"`{option.removeprefix(f'{PLAIN}+')}`")


def _finish(entries: Entries, rows: dict[str, Row | None]) -> str:
    """The table of the rows by their titles, and what is still to be measured."""
    found = [[title, *cells] for title, cells in rows.items() if cells is not None]
    if not found:
        return ""
    missing = "; ".join(title for title, cells in rows.items() if cells is None)
    left = f"\n\n*Not measured yet: {missing}.*" if missing else ""
    return f"{table(_HEAD, found)}\n\n{measured_on(entries.values())} Keys are those of trained.json.{left}"


def _methods(results: Load) -> str:
    entries = results("trained")
    rows = {"untrained": untrained_row(entries, "main")}
    for weights in ("full", "lora"):
        rows |= {f"{method}, {weights}": row(entries, method, weights=weights) for method in METHODS}
    text = _finish(entries, rows)
    return text and text + picture("trained-curves", "Curves of the methods, all seeds")


def _options(results: Load) -> str:
    entries, rows = results("trained"), {}
    for option in OPTIONS:
        rows[f"untrained, {describe(option)}"] = untrained_row(entries, "main", option)
        rows[f"control, served with {describe(option)}"] = row(entries, "control", served=option)
        rows |= {f"{method}, {describe(option)}": row(entries, method, option=option) for method in ("task", "distill")}
    for method in ("task", "distill"):
        rows[f"{method}, {describe(ALL)}, LoRA"] = row(entries, method, option=ALL, weights="lora")
    return _finish(entries, rows)


def _long(results: Load) -> str:
    entries = results("trained")
    rows = {f"untrained, {describe(option)}": untrained_row(entries, "long", option) for option in OPTIONS}
    rows |= {method: row(entries, method, size="long") for method in ("control", "task", "distill")}
    return _finish(entries, rows)


def _steps(results: Load) -> str:
    """Nothing until there are runs of two lengths to compare."""
    entries = {key: entry for key, entry in results("trained").items() if "seed=" not in key or f"seed={SEEDS[0]}" in key}
    arms = {"control": {}, "control, served with all three": {"served": ALL}, "task": {}, "task, all three": {"option": ALL}}
    arms |= {"distill": {}, "distill, all three": {"option": ALL}}
    rows = {
        f"{title}; {SIZES[size].steps} steps": row(entries, title.split(",")[0], size=size, **options)
        for title, options in arms.items()
        for size in ("short", "main", "longer")
    }
    lengths = {title.split("; ")[1] for title, cells in rows.items() if cells is not None}
    return _finish(entries, rows) if len(lengths) > 1 else ""


def _rates(results: Load) -> str:
    entries, rows = results("trained"), []
    for weights in ("full", "lora"):
        for method in METHODS:
            tried, best = tried_rates(entries, method, weights), best_rate(entries, method, weights)
            if tried:
                cells = ", ".join(f"{rate:g}: {value:.4f}" + " (chosen)" * (rate == best) for rate, value in tried.items())
                cells += "" if best else " *(not finished)*"
                key = Run(method=method, weights=weights, rate=1.0, seed=SEEDS[0]).key.replace("rate=1", "rate=*")
                rows.append([f"{method}, {weights}", cells, f"`{key}`"])
    return table(("", "learning rate: own objective on validation text, at the end", "keys"), rows)


def _curves(results: Load, file: Path) -> None:
    entries = results("trained")
    if not entries:
        return
    caption = f"SmolLM2-135M on Shakespeare, each at its best learning rate, one line a seed; {devices_of(entries.values())}"
    with figure(file, 2, caption=caption, width=6.0) as (losses, divergences):
        for color, method in enumerate(METHODS):
            for seed, entry in runs(entries, method).items():
                steps, style = [point["step"] for point in entry["curve"]], {"color": f"C{color}", "alpha": 0.8}
                label = in_words(method) if seed == 0 else None
                for axes, name in ((losses, "loss"), (divergences, "kl")):
                    axes.plot(steps, [point[f"{name}_{PLAIN}"] for point in entry["curve"]], "o-", ms=3, label=label, **style)
                losses.plot(steps, [point["loss_original"] for point in entry["curve"]], ":", **style)
        losses.set(title="held-out loss in 4-bit attention (dotted: original)", xlabel="step", ylabel="nats per token")
        divergences.set(title="how far from the starting model (KL)", xlabel="step", ylabel="nats per token", yscale="log")


TABLES = {
    "trained-methods": _methods,
    "trained-options": _options,
    "trained-long": _long,
    "trained-steps": _steps,
    "trained-rates": _rates,
}
FIGURES = {"trained-curves": _curves}
