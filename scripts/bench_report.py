"""A table in Markdown and a picture of what scripts/bench.py wrote as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench import Shape


def report(results: list[dict[str, Any]], png: Path | None) -> str:
    """The table, with times relative to FlashAttention-2; the picture goes to `png`."""
    by_row: dict[tuple[Shape, str], dict[str, dict[str, Any]]] = {}
    for each in results:
        shape = Shape(*(each[field] for field in Shape._fields))
        by_row.setdefault((shape, each["what"]), {})[each["name"]] = each
    names = list(dict.fromkeys(each["name"] for each in results))
    about = results[0]
    lines = [", ".join(f"{key} {about[key]}" for key in ("device", "torch", "triton", "dtype") if key in about), ""]
    lines.append("| shape | | " + " | ".join(f"{name}, ms" for name in names) + " | ours / FlashAttention-2 |")
    lines.append("|---" * (len(names) + 3) + "|")
    for (shape, what), row in by_row.items():
        cells = [f"{1e3 * row[name]['seconds'][1]:.2f}" if name in row else "" for name in names]
        base = next((row[name] for name in ("sdpa flash", "varlen_attn") if name in row), None)
        ratio = f"{row['ours']['seconds'][1] / base['seconds'][1]:.2f}" if base and "ours" in row else ""
        lines.append(f"| {shape} | {what} | " + " | ".join(cells) + f" | {ratio} |")
    if png is not None:
        draw(by_row, names, png)
    return "\n".join(lines)


def draw(by_row: dict[tuple[Shape, str], dict[str, dict[str, Any]]], names: list[str], png: Path) -> None:
    """A bar for each implementation, in TFLOP/s, one group a shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.6 * len(by_row)))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        rows = [(n, row[name]) for n, row in enumerate(by_row.values()) if name in row]
        keys = list(by_row)
        rates = [keys[n][0].flops(keys[n][1] != "forward") / each["seconds"][1] / 1e12 for n, each in rows]
        bars = axes.barh([n + (index - (len(names) - 1) / 2) * height for n, _ in rows], rates, height, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    axes.set_yticks(range(len(by_row)), [f"{shape}\n{what}" for shape, what in by_row], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s (4 B H Lq Lk D, 3.5 times that with backward)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(png, dpi=120)
