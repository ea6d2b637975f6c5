"""The tables about several GPUs in docs/BENCHMARKS.md, from the JSON in docs/benchmarks."""

from __future__ import annotations

import statistics
from typing import Any

from scripts.bench.scale_out import LAST
from scripts.evidence.report.speed import stored
from scripts.evidence.report.tables_and_figures import table

RECIPES = "h200x2_recipes"
_RUNS = (
    ("Qwen3, DDP", "one GPU", "qwen3 ddp", "qwen3 one"),
    ("Qwen3, FSDP2", "one GPU", "qwen3 fsdp2", "qwen3 one"),
    ("Wan, FSDP2 + Ulysses", "one GPU with the same noise", "wan ulysses", "wan one"),
    ("Wan, FSDP2", "Wan, DDP", "wan fsdp2", "wan ddp"),
)
"""What is compared, with what, and the runs of both."""
_LARGE = {
    "qwen3-14b-fsdp2": ("Qwen3 14B, all weights, 8,192 tokens a GPU, FSDP2", 40),
    "wan-14b-ulysses": ("Wan 2.1 14B, all weights, 720p, 81 frames, FSDP2 + Ulysses", 40),
}
"""Models of h200x2_recipes.json: what trains, and how many layers the whole model has."""

Record = dict[str, float]


def _recipes(_: Any) -> str:
    """The largest relative differences of two runs of a recipe."""
    runs: dict[str, list[Record]] = stored(RECIPES)["small"]
    rows = []
    for what, against, ours, theirs in _RUNS:
        pairs = list(zip(runs[ours], runs[theirs], strict=True))
        training = max(_difference(*pair, "loss") for pair in pairs if pair[0]["step"])
        before, after = (max(_difference(*pairs[at], f"eval_loss_{name}") for name in ("original", "fp4")) for at in (0, -1))
        rows.append((what, against, _relative(training), f"{_relative(before)}, {_relative(after)}"))
    return table(("", "against", "training losses", "held-out losses before, after"), rows)


def _difference(ours: Record, theirs: Record, name: str) -> float:
    return abs(ours[name] - theirs[name]) / abs(theirs[name])


def _relative(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def extra_time(model: str) -> float:
    """The share of a step's time that 4-bit attention adds to one of the large models."""
    found = stored(RECIPES)["14B"][model]
    ours, theirs = (statistics.median(found[name]["seconds"]) for name in ("fp4", "original"))
    return ours / theirs - 1


def _large(_: Any) -> str:
    """Steps of models of 14B sizes with fewer layers."""
    rows = []
    for model, (what, layers) in _LARGE.items():
        found = stored(RECIPES)["14B"][model]
        for name, words in (("fp4", "4-bit"), ("original", "its own (SDPA)")):
            run, first = found[name], name == "fp4"
            seconds = statistics.median(run["seconds"])
            measured = (f"{seconds:.2f}", f"{100 * run['mfu']:.1f} %", f"{run['peak_gib']:.1f}")
            slower = f"{1 + extra_time(model):.2f} x" if first else ""
            rows.append((what if first else "", f"{found['layers']} of {layers}" if first else "", words, *measured, slower))
    return table(("", "layers", "attention", "s a step", "MFU", "peak, GiB a GPU", "4-bit / its own"), rows)


def _scale_out(_: Any) -> str:
    """The means of the last losses of scripts.bench.scale_out."""

    def mean(model: str, how: str, seed: int = 0) -> float:
        return statistics.fmean(stored(f"h100x2_scale_out/{model}-{how}-{seed}")["losses"][-LAST:])

    rows = []
    for model, name, ways in (("wan", "Wan", ("ddp", "fsdp2", "ulysses")), ("qwen3", "Qwen3", ("ddp", "fsdp2"))):
        one = [mean(model, "one", seed) for seed in range(3)]
        spread = f"{statistics.fmean(one):.3f} ({min(one):.3f} to {max(one):.3f})"
        others = [f"{value:#.4g}" for value in (one[0], *(mean(model, how) for how in ways))]
        rows.append((name, spread, *others, *[""] * (4 - len(others))))
    return table(("", "one GPU", "same seed on one GPU", "DDP", "FSDP2", "Ulysses"), rows)


TABLES = {"h200x2_recipes": _recipes, "h200x2_large": _large, "h100x2_scale_out": _scale_out}
FIGURES: dict[str, Any] = {}
