"""Markdown tables and pictures from the JSON of `python -m scripts.bench` and scripts.bench.decode."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from qat_kernels.spec import Preset
from qat_patch.bench.attention import INFERENCE, TRAINING
from qat_patch.bench.shapes import Shape

Result = dict[str, Any]
IN_WORDS = {
    "ours": "4-bit attention, trainable",
    "sdpa flash": "BF16, FlashAttention-2",
    "sdpa cudnn": "BF16, cuDNN",
    "sdpa": "BF16, what PyTorch chooses",
    "varlen_attn": "BF16, FlashAttention-2, packed",
}
"""The names of the timed attentions in pictures."""


def report(results: list[Result], png: Path | None) -> str:
    """The table. The picture is written to `png`."""
    about = results[0]
    tabulate = attention_table
    if "ms" in about:
        tabulate = decode_table
    elif "tokens_per_second" in about:
        tabulate = generation_table
    lines, bars, axis = tabulate(results)
    if png is not None:
        draw(bars, axis, png, title=f"{about['device']}: a longer bar is better")
    head = ", ".join(f"{key} {about[key]}" for key in ("device", "torch", "triton", "dtype") if key in about)
    return "\n".join((head, "", *lines))


Table = tuple[list[str], dict[str, dict[str, float]], str]
"""Lines of Markdown; the lengths of bars by group and name; their meaning."""


def attention_table(results: list[Result]) -> Table:
    """Milliseconds, and ours relative to FlashAttention-2; bars are TFLOP/s."""
    by_row: dict[tuple[Shape, str], dict[str, Result]] = {}
    for each in results:
        by_row.setdefault((shape_of(each), each["what"]), {})[each["name"]] = each
    names = list(dict.fromkeys(each["name"] for each in results))
    ours = [name for name in names if name in (*TRAINING, *INFERENCE, *get_args(Preset))]
    titles = ["shape", "", *(f"{name}, ms" for name in names), *(f"{name} / FlashAttention-2" for name in ours)]
    lines = head(titles)
    bars: dict[str, dict[str, float]] = {}
    for (shape, what), row in by_row.items():
        seconds = {name: row[name]["seconds"][1] for name in names if name in row}
        base = next((seconds[name] for name in ("sdpa flash", "varlen_attn") if name in seconds), None)
        cells = [f"{1e3 * seconds[name]:.2f}" if name in seconds else "" for name in names]
        cells += [f"{seconds[name] / base:.2f}" if base and name in seconds else "" for name in ours]
        lines.append(line([shape, what, *cells]))
        bars[f"{shape}\n{what}"] = {name: shape.flops(what != "forward") / s / 1e12 for name, s in seconds.items()}
    return lines, bars, "TFLOP/s (4 B H Lq Lk D, half of that if causal, 3.5 times as much with backward)"


def shape_of(result: Result) -> Shape:
    """The shape that was timed. Older results lack some of its fields."""
    return Shape(**{field: result[field] for field in Shape._fields if field in result})


def decode_table(results: list[Result]) -> Table:
    """A step of attention from the FP4 caches against the fastest from BF16; bars are the speedup over BF16."""
    caches = [name for name in ("fp4 cache", "kv_nvfp4 cache") if any(each["name"] == name for each in results)]
    short = [name.removesuffix(" cache") for name in caches]
    faster = ["times faster", *(f"{name} times faster" for name in short[1:])]
    lines = head(
        ["batch", "tokens", *(f"{name}, ms" for name in caches), "best bf16 sdpa, ms", "", *faster]
        + [f"cache bytes, {name} / bf16" for name in short]
    )
    bars = {}
    for (batch, tokens), row in by_cell(results).items():
        ours = [row[name] for name in caches]
        theirs = min((each for name, each in row.items() if name not in caches), key=lambda x: x["ms"])
        cells = [*(f"{each['ms']:.3f}" for each in ours), f"{theirs['ms']:.3f}", theirs["name"].split()[-1]]
        cells += [f"{theirs['ms'] / each['ms']:.2f}" for each in ours] + [
            f"{each['bytes'] / theirs['bytes']:.3f}" for each in ours
        ]
        lines.append(line([batch, f"{tokens:,}", *cells]))
        times = {f"{name}: time, against the best BF16 SDPA": theirs["ms"] / row[f"{name} cache"]["ms"] for name in short}
        sizes = {f"{name}: bytes, against BF16": theirs["bytes"] / row[f"{name} cache"]["bytes"] for name in short}
        bars[f"batch {batch}, {tokens:,} tokens"] = times | sizes
    return lines, bars, "BF16 / cache of 4 bits"


def generation_table(results: list[Result]) -> Table:
    """`generate` from a BF16 and from the FP4 cache; bars are tokens per second after the first."""
    lines = head(["batch", "prompt", "layers", "", "first token, s", "tokens/s after it", "tokens/s in all", "cache, MB"])
    bars = {}
    for (batch, tokens), row in by_cell(results).items():
        for name, each in row.items():
            rates = [f"{rate:.0f}" for rate in (each["tokens_per_second"][1], each["tokens_per_second_in_all"])]
            cells = [f"{each['first_token_seconds']:.2f}", *rates, f"{each['cache_bytes'] / 1e6:.0f}"]
            lines.append(line([batch, f"{tokens:,}", each["layers"], name, *cells]))
        bars[f"batch {batch}, {tokens:,} tokens"] = {name: each["tokens_per_second"][1] for name, each in row.items()}
    return lines, bars, "tokens per second, after the first"


def by_cell(results: list[Result]) -> dict[tuple[int, int], dict[str, Result]]:
    """By batch and length, short ones first, then by name."""
    rows: dict[tuple[int, int], dict[str, Result]] = {}
    for each in results:
        rows.setdefault((each["batch"], each["length"]), {})[each["name"]] = each
    return dict(sorted(rows.items(), key=lambda row: row[0][::-1]))


def head(titles: list[str]) -> list[str]:
    return [line(titles), "|---" * len(titles) + "|"]


def line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(groups: dict[str, dict[str, float]], axis: str, png: Path, title: str) -> None:
    """A bar for each name, ours first, in the groups that have one of ours; `title`: the GPU."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ours = {*TRAINING, *INFERENCE, *get_args(Preset)}
    names = sorted(dict.fromkeys(name for bars in groups.values() for name in bars), key=lambda name: name not in ours)
    groups = {group: bars for group, bars in groups.items() if not ours.isdisjoint(bars) or ours.isdisjoint(names)}
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.6 * len(groups)))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        bars = [(n, row[name]) for n, row in enumerate(groups.values()) if name in row]
        places = [n + (index - (len(names) - 1) / 2) * height for n, _ in bars]
        drawn = axes.barh(places, [length for _, length in bars], height, label=IN_WORDS.get(name, name))
        axes.bar_label(drawn, fmt=lambda x: f"{x:.0f}" if x >= 10 else f"{x:.2g}", fontsize=7, padding=2)
    axes.set_yticks(range(len(groups)), list(groups), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(axis)
    axes.set_title(title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    figure.savefig(png, dpi=120, bbox_inches="tight")
