"""Tables and plots of experiment 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.evidence.ablations import ARMS, EXACT, GRADIENT_WINDOWS, LENGTHS, MEASURES, SEEDS, Gradients, Run
from scripts.evidence.estimates import Estimate, difference, estimate
from scripts.evidence.report.tables_and_figures import devices_of, figure, in_words, measured_on, picture, table

Entries = dict[str, dict[str, Any]]
Load = Callable[[str], Entries]
TRAININGS = (("512", 0.0), ("4096", 0.0), ("512", 1.0))
"""Size and distillation."""


def gradients(entries: Entries, length: int) -> list[dict[str, Any]]:
    """The units of a length."""
    keys = [Gradients(length=length, window=window).key for window in range(GRADIENT_WINDOWS)]
    return [entries[key] for key in keys if key in entries]


def layer_mean(units: list[dict[str, Any]], name: str, tensor: str, measure: str) -> Estimate:
    """The mean over layers; windows are the sample."""
    by_window = [sum(values) / len(values) for values in (unit["layers"][name][tensor][measure] for unit in units)]
    return estimate([[value] for value in by_window])


def _gradients(results: Load) -> str:
    entries, rows = results("ablations"), []
    for length in sorted(LENGTHS):
        units = gradients(entries, length)
        for name in [name for name, exact in EXACT.items() if name != exact] if units else []:
            whole = [estimate([[unit["whole"][name][measure]] for unit in units]) for measure in MEASURES]
            cells = [layer_mean(units, name, tensor, "relative_l2") for tensor in ("dq", "dk", "dv")]
            cells += [layer_mean(units, name, "dv", "norm_ratio"), *whole]
            windows = ",".join(str(unit["settings"]["window"]) for unit in units)
            keys = f"`gradients/{length}/window={windows}` {name}"
            rows.append([str(length), name, *[f"{cell.mean:.3f}" for cell in cells], keys])
    head = (
        "tokens",
        "backward",
        "dQ error",
        "dK error",
        "dV error",
        "dV norm kept",
        "parameters, error",
        "parameters, cosine",
        "parameters, norm kept",
        "keys",
    )
    missing = [str(length) for length in sorted(LENGTHS) if not gradients(entries, length)]
    left = f"\n\n*Not measured yet: {', '.join(missing)} tokens.*" if missing else ""
    left += picture("gradient-errors", "Gradient errors by length")
    return f"{table(head, rows)}\n\n{measured_on(entries.values())} Keys are those of ablations.json.{left}" if rows else ""


def runs(entries: Entries, arm: str, size: str, distillation: float) -> dict[int, dict[str, Any]]:
    """The runs of an arm by seed."""
    keys = {seed: Run(arm=arm, size=size, seed=seed, distillation=distillation).key for seed in SEEDS}
    return {seed: entries[key] for seed, key in keys.items() if key in entries}


def served(entry: dict[str, Any], measure: str = "loss") -> list[float]:
    """Test windows in the attention that the arm is served in."""
    test = entry["test"]
    return test.get(f"{measure}_served", test.get(f"{measure}_trained"))


def _training(results: Load) -> str:
    entries, rows = results("ablations"), []
    for size, distillation in TRAININGS:
        ours = runs(entries, "definition", size, distillation)
        for arm in ARMS:
            found = {seed: entry for seed, entry in runs(entries, arm, size, distillation).items() if seed in ours}
            if not found:
                continue
            losses, kls = ([served(entry, name) for entry in found.values()] for name in ("loss", "kl"))
            against = [
                estimate(difference(values, [served(ours[seed], name) for seed in found]))
                for name, values in (("loss", losses), ("kl", kls))
            ]
            norms = [entry["grad_norm"] for entry in found.values()]
            mean_norm, largest = sum(map(sum, norms)) / sum(map(len, norms)), max(map(max, norms))
            objective = "distillation" if distillation else "task"
            cells = [str(estimate(losses)), against[0].signed() if arm != "definition" else ""]
            cells += [str(estimate(kls)), against[1].signed() if arm != "definition" else ""]
            key = Run(arm=arm, size=size, seed=0, distillation=distillation).key.replace("seed=0", "seed=*")
            rows.append([f"{objective}, {size} tokens", arm, *cells, f"{mean_norm:.2f}", f"{largest:.2f}", f"`{key}`"])
    head = (
        "",
        "arm",
        "loss, served",
        "against definition",
        "KL, served",
        "against definition",
        "mean gradient norm",
        "largest",
        "keys",
    )
    about = f"{measured_on(entries.values())} Keys are those of ablations.json."
    return f"{table(head, rows)}\n\n{about}{picture('ablation-curves', 'Losses and gradient norms')}" if rows else ""


def _gradient_errors(results: Load, file: Path) -> None:
    entries = results("ablations")
    lengths = [length for length in sorted(LENGTHS) if gradients(entries, length)]
    if not lengths:
        return
    caption = f"SmolLM2-135M before training, against the exact gradient of the same forward; {devices_of(entries.values())}"
    with figure(file, 2, caption=caption) as (whole, layers):
        for name in [name for name, exact in EXACT.items() if name != exact]:
            found = [gradients(entries, length) for length in lengths]
            errors = [estimate([[unit["whole"][name]["relative_l2"]] for unit in units]).mean for units in found]
            whole.plot(lengths, errors, "o-", label=in_words(name))
            layers.plot(
                lengths, [layer_mean(units, name, "dv", "relative_l2").mean for units in found], "o-", label=in_words(name)
            )
        for axes, title in ((whole, "gradient of all parameters"), (layers, "dV, mean over layers")):
            axes.set(title=f"relative L2 error: {title}", xlabel="tokens", xscale="log")
            axes.set_xticks(lengths, [str(length) for length in lengths])
            axes.minorticks_off()


def _curves(results: Load, file: Path) -> None:
    found = {arm: runs(results("ablations"), arm, "512", 0.0) for arm in ARMS}
    if not any(found.values()):
        return
    caption = f"SmolLM2-135M on Shakespeare, one line a seed; {devices_of(results('ablations').values())}"
    with figure(file, 2, caption=caption) as (losses, norms):
        for color, arm in enumerate(ARMS):
            for number, entry in enumerate(found[arm].values()):
                style = {"color": f"C{color}", "alpha": 0.7, "label": None if number else in_words(arm)}
                name = "loss_served" if "loss_served" in entry["curve"][0] else "loss_trained"
                losses.plot(
                    [point["step"] for point in entry["curve"]], [point[name] for point in entry["curve"]], "o-", ms=3, **style
                )
                norms.plot(range(1, len(entry["grad_norm"]) + 1), entry["grad_norm"], lw=0.8, **style)
        losses.set(title="held-out loss as served, 512 tokens", xlabel="step", ylabel="nats per token")
        norms.set(title="gradient norm before clipping", xlabel="step", yscale="log")


TABLES = {"ablation-gradients": _gradients, "ablation-training": _training}
FIGURES = {"gradient-errors": _gradient_errors, "ablation-curves": _curves}
