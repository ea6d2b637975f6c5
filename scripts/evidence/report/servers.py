"""The tables of experiment 6."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from scripts.evidence import trained
from scripts.evidence.estimates import Estimate, difference, estimate
from scripts.evidence.report.tables_and_figures import devices_of, figure, measured_on, picture, table
from scripts.evidence.servers import CACHE, METHODS, SAGE, STEPS, VIDEO_RATES, plan_language, plan_video

Results = Callable[[str], Mapping[str, dict[str, Any]]]
HEAD = ("", "served in", "seeds", "loss, own original attention", "above it, served", "KL to the start", "KL to its own original")
COST = "kv-cache-cost"
IN_WORDS = {
    "untrained": "not trained",
    "control": "fine-tuned without the cache",
    "distill": "distilled through the cache",
    "task": "fine-tuned through the cache",
}
VIDEO_HEAD = ("", "served in", "seeds", "loss, 10⁻³", "velocity error, 10⁻³", "PSNR, dB", "SSIM")


def _language(results: Results) -> str:
    entries, rows = results("servers_language"), []
    if "untrained/main" not in entries:
        return ""
    start = entries["untrained/main"]["test"]
    for name in (key.removeprefix("kl_") for key in start if key.startswith("kl_") and key != "kl_original"):
        rows.append(_row("untrained", name, [start]))
    for method in METHODS:
        rate = trained.best_rate(entries, method, "full", CACHE)
        if rate is None:
            continue
        keys = [trained.Run(method=method, option=CACHE, rate=rate, seed=seed).key for seed in trained.SEEDS]
        tests = [entries[key]["test"] for key in keys if key in entries]
        for served in (key.removeprefix("kl_") for key in tests[0] if key.startswith("kl_") and key != "kl_original"):
            rows.append(_row(f"{method}, rate {rate:g}", served, tests))
    drawn = costs_of_the_cache(results)
    shown = picture(COST, "What an NVFP4 KV cache costs a language model, untrained and trained") if drawn else ""
    return _with_notes(table(HEAD, rows), entries, plan_language(entries), "servers_language") + shown


def tests_of_the_cache(results: Results) -> dict[str, list[dict[str, Any]]]:
    """What runs measured through the cache, by what was done to the model: one a seed. Empty until all ran."""
    entries = results("servers_language")
    tests = {name: [entries[key]["test"] for key in _keys(entries, name) if key in entries] for name in IN_WORDS}
    return tests if all(tests.values()) else {}


def cost_of_the_cache(tests: list[dict[str, Any]]) -> Estimate:
    """What the cache adds to the loss of the model's own original attention."""
    return estimate(difference([test[f"loss_{CACHE}"] for test in tests], [test["loss_original"] for test in tests]))


def costs_of_the_cache(results: Results) -> dict[str, Estimate]:
    """By what was done to the model, in words. Empty until all ran."""
    return {IN_WORDS[name]: cost_of_the_cache(tests) for name, tests in tests_of_the_cache(results).items()}


def _keys(entries: Mapping[str, Any], method: str) -> list[str]:
    if method == "untrained":
        return ["untrained/main"]
    rate = trained.best_rate(entries, method, "full", CACHE)
    return [trained.Run(method=method, option=CACHE, rate=rate, seed=seed).key for seed in trained.SEEDS] if rate else []


def _draw_costs(results: Results, file: Path) -> None:
    if not (costs := costs_of_the_cache(results)):
        return
    devices = devices_of(results("servers_language").values())
    caption = f"SmolLM2-135M, {STEPS:,} steps, {len(trained.SEEDS)} seeds, with standard errors; {devices}"
    with figure(file, 1, caption=caption, width=9.0, height=3.2) as (axes,):
        bars = axes.barh(
            list(costs),
            [each.mean for each in costs.values()],
            xerr=[each.error for each in costs.values()],
            color=["tab:gray", "tab:gray", "tab:blue", "tab:blue"],
            capsize=3,
        )
        axes.bar_label(bars, labels=[f"{each.mean:.3f}" for each in costs.values()], padding=8)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_title("Training through the NVFP4 KV cache halves what it costs")
        axes.set_xlabel("extra loss on held-out text, against the same model without the cache (nats per token)", fontsize=9)


def _row(what: str, served: str, tests: list[dict[str, list[float]]]) -> list[str]:
    original, ours = ([test[f"loss_{name}"] for test in tests] for name in ("original", served))
    cells = [str(estimate(original)), estimate(difference(ours, original)).signed()]
    cells += [str(estimate([test[f"{name}_{served}"] for test in tests])) for name in ("kl", "between")]
    return [what, f"`{served}`", str(len(tests)), *cells]


def _video(results: Results) -> str:
    entries, rows = results("servers_video"), []
    for key, entry in entries.items():
        if "loss" in entry["test"] and key != "original":
            rows.append(_video_row("untrained", key, [entry["test"]]))
    for method in METHODS:
        tests = [
            entry["test"]
            for entry in entries.values()
            if entry["settings"].get("method") == method and entry["settings"].get("attention") == SAGE
        ]
        for served in tests[0] if tests else ():
            rows.append(_video_row(f"{method}, rate {VIDEO_RATES[method]:g}", served, [test[served] for test in tests]))
    return _with_notes(table(VIDEO_HEAD, rows), entries, plan_video(entries), "servers_video") if rows else ""


def _video_row(what: str, served: str, tests: list[dict[str, list[float]]]) -> list[str]:
    scaled = [[[1e3 * x for x in test[name]] for test in tests] for name in ("loss", "velocity_error")]
    cells = [f"{each.mean:.2f} ± {each.error:.2f}" for each in map(estimate, scaled)]
    psnr, ssim = (estimate([test[name] for test in tests]) for name in ("psnr", "ssim"))
    return [
        what,
        f"`{served}`",
        str(len(tests)),
        *cells,
        f"{psnr.mean:.1f} ± {psnr.error:.1f}",
        f"{ssim.mean:.4f} ± {ssim.error:.4f}",
    ]


def _with_notes(text: str, entries: Mapping[str, Any], plan: Iterator[tuple[str, Any]], name: str) -> str:
    missing = ", ".join(f"`{key}`" for key, _ in plan if key not in entries)
    left = f"\n\n*Not measured yet: {missing}.*" if missing else ""
    return f"{text}\n\n{measured_on(entries.values())} Keys are those of {name}.json.{left}"


TABLES = {"servers_language": _language, "servers_video": _video}
FIGURES = {COST: _draw_costs}
