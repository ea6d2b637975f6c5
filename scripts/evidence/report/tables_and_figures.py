"""What reports share: Markdown tables, and what was measured on what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Rows = list[Sequence[str]]


def table(head: Sequence[str], rows: Rows) -> str:
    """Markdown; nothing if there are no rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def measured_on(entries: Iterable[dict[str, Any]]) -> str:
    """One sentence: devices and versions."""
    machines = [entry["machine"] for entry in entries]
    names = {", ".join([each["device"], *(f"{k} {each[k]}" for k in ("torch", "triton") if k in each)]) for each in machines}
    return f"Measured on {'; '.join(sorted(names))}."


def picture(name: str, caption: str) -> str:
    """A figure in the document, beside the table that it belongs to."""
    return f"\n\n![{caption}](evidence/{name}.png)"


def figure(file: Path, panels: int, *, width: float = 5.2, height: float = 4.4) -> Any:
    """A context with a figure's axes, two in a row, each of this size in inches; it is written when the context ends."""
    import contextlib

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    @contextlib.contextmanager
    def drawing():
        columns, rows = min(panels, 2), -(-panels // 2)
        picture, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
        yield axes.flatten()
        for each in axes.flatten():
            each.grid(alpha=0.3)
            if each.get_legend_handles_labels()[0]:
                each.legend(fontsize=7)
        picture.tight_layout()
        # Without the version of matplotlib, so that a figure changes with its data alone.
        picture.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(picture)

    return drawing()
