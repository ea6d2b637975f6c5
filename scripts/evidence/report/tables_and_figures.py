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


_IN_WORDS = {
    "original": "original attention",
    "nvfp4": "4-bit",
    "pv_bf16": "4-bit Q and K only",
    "p_only": "4-bit P only",
    "v_only": "4-bit V only",
    "rotate+k_shift+four_over_six": "all three options",
    "k_shift": "K shift",
    "four_over_six": "four over six",
    "sage3": "SageAttention3",
    "v_along_head_dim": "4-bit, V along the head dim",
    "single_level": "4-bit, P with one scale",
    "public_training": "public training kernel",
    "public_serving": "public serving kernel",
    "public_pair": "public kernels: one to train, one to serve",
    "definition": "this package",
    "d_from_o": "D from the quantized output",
    "p_unquantized_in_dv": "dV from unquantized P",
    "normalized_p_backward": "dV from normalized P, rounded again",
    "control": "fine-tuned in original attention",
    "task": "fine-tuned through 4 bits",
    "distill": "distilled through 4 bits",
    "mix": "mix of both through 4 bits",
    "control_mix": "mix of both in original attention",
}


def in_words(name: str) -> str:
    """A method or an attention for people: in `nvfp4+rotate+k_shift` each part, all three options as one."""
    start, _, options = name.partition("+")
    parts = [start, options] if options in _IN_WORDS else [start, *filter(None, options.split("+"))]
    return " + ".join(_IN_WORDS.get(part, part) for part in parts)


def devices_of(entries: Iterable[dict[str, Any]]) -> str:
    """The GPUs that something was measured on, for the caption of a figure."""
    return ", ".join(sorted({entry["machine"]["device"] for entry in entries if "machine" in entry}))


def measured_on(entries: Iterable[dict[str, Any]]) -> str:
    """One sentence: devices and versions."""
    machines = [entry["machine"] for entry in entries]
    names = {", ".join([each["device"], *(f"{k} {each[k]}" for k in ("torch", "triton") if k in each)]) for each in machines}
    return f"Measured on {'; '.join(sorted(names))}."


def picture(name: str, caption: str) -> str:
    """A figure in a document of docs/evidence, beside the table that it belongs to."""
    return f"\n\n![{caption}]({name}.png)"


def figure(file: Path, panels: int, *, caption: str, width: float = 5.2, height: float = 4.4) -> Any:
    """A context with a figure's axes, two in a row, each of this size in inches, above a caption; written when it ends."""
    import contextlib

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    @contextlib.contextmanager
    def drawing():
        columns, rows = min(panels, 2), -(-panels // 2)
        picture, axes = pyplot.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
        yield axes.flatten()
        explained = None
        for each in axes.flatten():
            each.grid(alpha=0.3)
            labels = each.get_legend_handles_labels()[1]
            if labels and labels != explained:  # panels with the same lines share a legend
                each.legend(fontsize=7, handlelength=4)  # dashes show beside the marker
            explained = labels or explained
        picture.supxlabel(caption, fontsize=8)
        picture.tight_layout()
        # Without the version of matplotlib, so that a figure changes with its data alone.
        picture.savefig(file, dpi=110, metadata={"Software": None})
        pyplot.close(picture)

    return drawing()
