"""docs/SIZING.md, from what scripts.bench.sizing measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.full_size_report import section
from scripts.paths import DOCS

FILE = DOCS / "SIZING.md"
GPUS = {"24": "RTX 4090", "32": "RTX 5090", "48": "L40S", "80": "H100", "96": "RTX PRO 6000", "141": "H200", "180": "B200"}
"""Memory as it is sold, and a GPU that has it."""
MARGIN = 0.10
"""What is left free of the GiB of that number: the CUDA context, fragmentation, and the part of them that a GPU does not have."""
STATIC = {"full": 16, "distillation": 20}
"""Bytes a weight in float32: weights, gradients, two moments of AdamW, and the teacher."""
FAR = 2.5
"""Not further than so many times the longest length that was measured."""

HEAD = """# What fits which GPU

Written by `python -m scripts.bench.sizing report {file}` from what `measure {file}` measured before; do not edit.
Measured on: {about}.

The longest sequence of one training step through 4-bit attention (`batch_size=1`), with the recipes' loop and
`mixed_precision=bf16`, `model.gradient_checkpointing=true` and `fused_optimizer=true`:

- **full**: all weights, in float32, with gradients and AdamW's moments: 16 bytes a weight;
- **distillation**: that, and a float32 copy as the teacher: 20 bytes a weight;
- **LoRA**: rank 16 on the projections of attention, frozen weights in bfloat16: 2 bytes a weight;
- **LoRA distillation**: the same; the model is its own teacher.

What fits takes at most {used:.0f} % of so many GiB: the rest is for the CUDA context and fragmentation, and because a GPU has a
little less than its number. Measuring on held-out data, and `samples`, may take more.

- **-**: does not fit;
- **~**: longer than what was measured, by the straight line of section 3; at most {far} times as long;
- **?**: the weights fit, and what the rest takes was not measured.
"""


class Line(NamedTuple):
    """Bytes at a length: the static part, or fixed + per_token * tokens where that is more."""

    fixed: float
    per_token: float
    static: int
    longest: int
    """Of those measured."""
    error: float | None
    """The largest error at lengths between the two that the line goes through, relative."""

    def bytes(self, tokens: int) -> float:
        return max(self.static, self.fixed + self.per_token * tokens)


def fit(case: dict[str, Any], weights: int) -> Line | None:
    """Through the shortest and the longest length that ran; None if fewer than two did."""
    points = [(n, peak) for n, peak in zip(case["tokens"], case["peak_bytes"], strict=True) if peak is not None]
    if len(points) < 2:
        return None
    (n, low), *between, (m, high) = points
    slope = (high - low) / (m - n)
    line = Line(low - slope * n, slope, STATIC.get(case["method"], 2) * weights, m, None)
    errors = [abs(line.bytes(length) / peak - 1) for length, peak in between]
    return line._replace(error=max(errors, default=None))


def report(file: Path) -> str:
    """The whole text.

    Raises:
        ValueError: nothing was measured.
    """
    results = json.loads(file.read_text(encoding="utf-8"))
    lines = {}
    for case in results["cases"]:
        if line := fit(case, results["weights"][case["model"]]):
            lines[case["model"], case["method"]] = line
    if not lines:
        raise ValueError(f"{file}: expected lengths of which memory was measured, on a GPU, got none")
    head = HEAD.format(
        file=f"docs/benchmarks/{file.name}",
        about=", ".join(f"{name} {value}" for name, value in results["about"].items()),
        used=100 * (1 - MARGIN),
        far=FAR,
    )
    sections = [head]
    for number, (family, what, cell) in enumerate(
        (("Wan", "Frames of 480x832 and of 720x1280, of 81", _frames), ("Qwen3", "Tokens, of 32,768", _tokens)), 1
    ):
        sections += [f"## {number}. {family}\n", f"{what}.\n", _table(family, results, lines, cell)]
    sections += ["## 3. Measured\n", _measured(results, lines), section()]
    return "\n".join(sections)


def _table(family: str, results: dict[str, Any], lines: dict[tuple[str, str], Line], cell: Callable[[Line, float], str]) -> str:
    rows = [f"| | | weights | {' | '.join(f'{size} GB ({gpu})' for size, gpu in GPUS.items())} |", "|---" * (3 + len(GPUS)) + "|"]
    for model, weights in results["weights"].items():
        methods = [method for name, method in lines if name == model]
        # Whether the weights alone fit is arithmetic.
        methods += [method for method in STATIC if method not in methods]
        for method in sorted(methods, key=list({**STATIC, "LoRA": 0, "LoRA distillation": 0}).index):
            cells = []
            for size in GPUS:
                room = int(size) * 2**30 * (1 - MARGIN)
                if (model, method) in lines:
                    cells.append(cell(lines[model, method], room))
                else:
                    cells.append("?" if STATIC[method] * weights <= room else "-")
            if model.startswith(family):
                rows.append(f"| {model} | {method} | {weights / 1e9:.2f} G | {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


def _tokens(line: Line, room: float) -> str:
    lengths = [n for n in range(1024, 32_768 + 1, 1024) if line.bytes(n) <= room and n <= FAR * line.longest]
    return f"{'~' if lengths[-1] > line.longest else ''}{lengths[-1]:,}" if lengths else "-"


def _frames(line: Line, room: float) -> str:
    """Frames of both resolutions. Patches are 16 x 16 pixels, and a latent frame is four frames, but the first is one."""
    cells = []
    for height, width in ((480, 832), (720, 1280)):
        tokens = {frames: (1 + (frames - 1) // 4) * (height // 16) * (width // 16) for frames in range(1, 82, 4)}
        fitting = [frames for frames, n in tokens.items() if line.bytes(n) <= room and n <= FAR * line.longest]
        cells.append(f"{'~' if tokens[fitting[-1]] > line.longest else ''}{fitting[-1]}" if fitting else "-")
    return " / ".join(cells)


def _measured(results: dict[str, Any], lines: dict[tuple[str, str], Line]) -> str:
    rows = ["| | | peak, GiB | fixed, GiB | MiB a token | error between |", "|---|---|---|---|---|---|"]
    for case in results["cases"]:
        points = zip(case["tokens"], case["peak_bytes"], strict=True)
        peaks = "; ".join(f"{n:,}: " + ("does not fit" if peak is None else f"{peak / 2**30:.2f}") for n, peak in points)
        line = lines.get((case["model"], case["method"]))
        fitted = ["", "", ""]
        if line is not None:
            error = "" if line.error is None else f"{100 * line.error:.1f} %"
            fitted = [f"{line.fixed / 2**30:.2f}", f"{line.per_token / 2**20:.3f}", error]
        rows.append(f"| {case['model']} | {case['method']} | {peaks} | {' | '.join(fitted)} |")
    return "\n".join([*rows, ""])
