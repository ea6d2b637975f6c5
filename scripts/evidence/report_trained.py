"""Tables and curves of experiment 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from report_tools import figure, measured_on, table
from summary import Estimate, Matrix, difference, estimate, share
from trained import ALL, METHODS, OPTIONS, PLAIN, SEEDS, Run, best_rate, tried_rates

Entries = dict[str, dict[str, Any]]
Load = Callable[[str], Entries]
REFERENCE = {"task": "control", "mix": "control_mix"}
"""What equally long training makes of original attention. Distillation in original attention has nothing to learn: its reference
is the starting model."""
_HEAD = (
    "",
    "loss, original",
    "loss, FP4",
    "gap",
    "of the untrained gap",
    "KL, FP4",
    "of the untrained KL",
    "KL, FP4 to own",
    "keys",
)


def runs(entries: Entries, method: str, **options: Any) -> dict[int, dict[str, Any]]:
    """The runs of a method at its learning rate, by seed."""
    rate = best_rate(entries, method, options.get("weights", "full"))
    if rate is None:
        return {}
    keys = {seed: Run(method=method, rate=rate, seed=seed, **options).key for seed in SEEDS}
    return {seed: entries[key] for seed, key in keys.items() if key in entries}


def row(entries: Entries, title: str, method: str, **options: Any) -> list[str] | None:
    """A method: losses, what is left of the gap and of the KL, and where to find it."""
    size, option = options.get("size", "main"), options.get("option", PLAIN)
    found, before = runs(entries, method, **options), entries.get(untrained_key(size))
    if not found or before is None:
        return None
    reference = [before["test"]["loss_original"]]
    if method != "distill":
        shared = {name: value for name, value in options.items() if name != "option"}
        equally_long = runs(entries, REFERENCE.get(method, method), **shared)
        found = {seed: entry for seed, entry in found.items() if seed in equally_long}
        if not found:
            return None
        reference = column(equally_long[seed] for seed in found)("loss_original")
    measured = column(found.values())
    gap = estimate(difference(measured(f"loss_{option}"), reference))
    untrained_gap, untrained_kl = untrained(before, option)
    kl = estimate(measured(f"kl_{option}"))
    settings = next(iter(found.values()))["settings"]
    key = Run(method=method, rate=settings["rate"], seed=0, **options).key.replace("seed=0", f"seed={','.join(map(str, found))}")
    losses = [str(estimate(measured(name))) for name in ("loss_original", f"loss_{option}")]
    own = str(estimate(measured(f"between_{option}")))
    return [title, *losses, gap.signed(), share(gap, untrained_gap), str(kl), share(kl, untrained_kl), own, f"`{key}`"]


def column(entries: Iterable[dict[str, Any]]) -> Callable[[str], Matrix]:
    """What runs measured on test windows, by name."""
    tests = [entry["test"] for entry in entries]
    return lambda name: [test[name] for test in tests]


def untrained(before: dict[str, Any], option: str) -> tuple[Estimate, Estimate]:
    """Gap and KL of the starting model: in plain NVFP4, whatever the option, so that all rows are measured by one yardstick."""
    test = before["test"]
    return estimate(difference([test[f"loss_{PLAIN}"]], [test["loss_original"]])), estimate([test[f"kl_{PLAIN}"]])


def untrained_key(size: str) -> str:
    """Where the starting model was measured on the test windows of a size: runs of other steps share those of `main`."""
    return f"untrained/{'long' if size == 'long' else 'main'}"


def untrained_row(entries: Entries, size: str, option: str = PLAIN) -> list[str] | None:
    """The starting model."""
    key = untrained_key(size)
    if key not in entries:
        return None
    test, (whole_gap, whole_kl) = entries[key]["test"], untrained(entries[key], option)
    gap = estimate(difference([test[f"loss_{option}"]], [test["loss_original"]]))
    kl = estimate([test[f"kl_{option}"]])
    losses = [str(estimate([test[name]])) for name in ("loss_original", f"loss_{option}")]
    title = "untrained" if option == PLAIN else f"untrained, {describe(option)}"
    return [title, *losses, gap.signed(), share(gap, whole_gap), str(kl), share(kl, whole_kl), str(kl), f"`{key}`"]


def describe(option: str) -> str:
    """An option in words."""
    return {PLAIN: "plain", ALL: "all three"}.get(option, f"`{option.removeprefix(f'{PLAIN}+')}`")


def _finish(entries: Entries, rows: Iterable[list[str] | None]) -> str:
    rows = [each for each in rows if each is not None]
    if not rows:
        return ""
    return f"{table(_HEAD, rows)}\n\n{measured_on(entries.values())} Keys are those of trained.json."


def _methods(results: Load) -> str:
    entries = results("trained")
    rows = [untrained_row(entries, "main")]
    for weights in ("full", "lora"):
        rows += [row(entries, f"{method}, {weights}", method, weights=weights) for method in METHODS]
    return _finish(entries, rows)


def _options(results: Load) -> str:
    entries, rows = results("trained"), []
    for option in OPTIONS:
        rows.append(untrained_row(entries, "main", option))
        rows += [row(entries, f"{method}, {describe(option)}", method, option=option) for method in ("task", "distill")]
    return _finish(entries, rows)


def _long(results: Load) -> str:
    entries = results("trained")
    rows = [row(entries, method, method, size="long") for method in ("control", "task", "distill")]
    return _finish(entries, [untrained_row(entries, "long"), *rows])


def _steps(results: Load) -> str:
    entries = {key: entry for key, entry in results("trained").items() if "seed=" not in key or f"seed={SEEDS[0]}" in key}
    rows = []
    for method in ("control", "task", "distill"):
        for size in ("short", "main", "longer"):
            found = runs(entries, method, size=size)
            if found:
                rows.append(row(entries, f"{method}, {found[SEEDS[0]]['settings']['steps']} steps", method, size=size))
    return _finish(entries, rows)


def _rates(results: Load) -> str:
    entries, rows = results("trained"), []
    for weights in ("full", "lora"):
        for method in METHODS:
            tried, best = tried_rates(entries, method, weights), best_rate(entries, method, weights)
            if tried:
                cells = ", ".join(f"{rate:g}: {value:.4f}" + " (chosen)" * (rate == best) for rate, value in tried.items())
                key = Run(method=method, weights=weights, rate=1.0, seed=SEEDS[0]).key.replace("rate=1", "rate=*")
                rows.append([f"{method}, {weights}", cells, f"`{key}`"])
    return table(("", "learning rate: own objective on validation text, at the end", "keys"), rows)


def _curves(results: Load, file: Path) -> None:
    entries = results("trained")
    if not entries:
        return
    with figure(file, 2) as (losses, divergences):
        for color, method in enumerate(METHODS):
            for seed, entry in runs(entries, method).items():
                steps, style = [point["step"] for point in entry["curve"]], {"color": f"C{color}", "alpha": 0.8}
                label = method if seed == 0 else None
                for axes, name in ((losses, "loss"), (divergences, "kl")):
                    axes.plot(steps, [point[f"{name}_{PLAIN}"] for point in entry["curve"]], "o-", ms=3, label=label, **style)
                losses.plot(steps, [point["loss_original"] for point in entry["curve"]], ":", **style)
        losses.set(title="validation loss in FP4 (dotted: original attention)", xlabel="step", ylabel="nats per token")
        divergences.set(title="KL(starting model || model in FP4)", xlabel="step", yscale="log")


TABLES = {
    "trained-methods": _methods,
    "trained-options": _options,
    "trained-long": _long,
    "trained-steps": _steps,
    "trained-rates": _rates,
}
FIGURES = {"trained-curves": _curves}
