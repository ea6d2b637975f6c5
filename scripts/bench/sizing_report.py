"""docs/SIZING.md, from what scripts.bench.sizing measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.full_size_report import section
from scripts.paths import DOCS

FILE = DOCS / "SIZING.md"
GPUS = {
    "8": "RTX 4060",
    "16": "RTX 4080",
    "24": "RTX 4090",
    "32": "RTX 5090",
    "48": "L40S",
    "80": "H100",
    "96": "RTX PRO 6000",
    "141": "H200",
    "180": "B200",
}
"""Memory as it is sold, and a GPU that has it."""
MARGIN = 0.10
"""What is left free of the GiB of that number: the CUDA context, fragmentation, and the part of them that a GPU does not have."""
STATIC = {
    "full": 16,
    "full, paged AdamW": 8,
    "full, 8-bit AdamW": 10,
    "full, 8-bit AdamW, activations": 10,
    "full, kept attention": 16,
    "distillation": 20,
    "LoRA": 2,
    "LoRA, activations": 2,
    "LoRA, kept attention": 2,
    "LoRA, float8": 1,
    "LoRA, float8, activations": 1,
    "LoRA, NF4": 0.5,
    "LoRA, NF4, activations": 0.5,
    "LoRA, layers": 0,
    "LoRA, layers, activations": 0,
    "LoRA, float8, expert": 0.5,
    "LoRA, float8, expert, activations": 0.5,
    "LoRA distillation": 2,
}
"""Bytes a weight that are always on the GPU: in full fine-tuning weights and gradients in float32, two moments of AdamW, and the
teacher."""
ALWAYS = ("full", "distillation")
"""Methods that are in the tables of models of one transformer even where nothing was measured."""
FAR = 2.5
"""Not further than so many times the longest length that was measured."""

HEAD = """# What fits which GPU

Written by `make evidence` from what `python -m scripts.bench.sizing measure {file}` measured; do not edit.
Measured on: {about}.

The longest sequence of one training step through 4-bit attention (`batch_size=1`), with the recipes' loop and
`mixed_precision=bf16`, `model.gradient_checkpointing=true` and `fused_optimizer=true`:

- **full**: all weights, in float32, with gradients and AdamW's moments: 16 bytes a weight;
- **distillation**: the same, and a float32 copy as the teacher: 20 bytes a weight;
- **LoRA**: rank 16 on the projections of attention, frozen weights in bfloat16: 2 bytes a weight;
- **LoRA distillation**: the same; the model is its own teacher.

What makes it smaller:

- **8-bit AdamW** (`optimizer=adamw_8bit`): 10 bytes a weight instead of 16;
- **paged AdamW** (`optimizer=paged_adamw`): its moments, 8 bytes a weight, leave the GPU when it is full, and are not measured
  here;
- **float8**, **NF4** (`lora.base_dtype`): frozen weights of the blocks take 1 byte, or about half a byte;
- **layers** (`lora.offload=layers`): frozen weights of the blocks wait in CPU memory until they are needed;
- **expert** (`lora.offload=expert`): of Wan 2.2 the transformer that is not in use waits there;
- **activations** (`offload_activations=true`): the inputs of the blocks wait there for the backward pass.

What makes it larger, and steps shorter:

- **kept attention** (`model.keep_attention=true`): the results of 4-bit attention are kept, which otherwise runs twice a step.

A length fits if the step takes at most {used:.0f} % of the GPU's GiB. The rest is for the CUDA context and for fragmentation, and
a GPU has a little less memory than its number says. Measuring on held-out data, and `samples`, may take more.

- **-**: does not fit;
- **~**: longer than what was measured, by the straight line of the section *Measured*; at most {far} times as long;
- **?**: the weights fit, and what the rest takes was not measured.
"""


CAPPED = """## 3. Small GPUs

We limited PyTorch's allocator to the GiB of the third column, on a larger GPU (`torch.cuda.set_per_process_memory_fraction`).
The CUDA context, about half a GiB, is not counted. *Reserved* is the most that the allocator took from the GPU. Seconds are
of one step of the longest length, where it was timed; other work ran on the same GPU then.
"""


class Line(NamedTuple):
    """Bytes at a length: the static part, or fixed + per_token * tokens where that is more."""

    fixed: float
    per_token: float
    static: float
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
    line = Line(low - slope * n, slope, STATIC[case["method"]] * weights, m, None)
    errors = [abs(line.bytes(length) / peak - 1) for length, peak in between]
    return line._replace(error=max(errors, default=None))


def measured() -> Path:
    """The only file of docs/benchmarks about memory.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = sorted((DOCS / "benchmarks").glob("*_memory.json"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(f"docs/benchmarks: expected one *_memory.json, got {names}")
    return found[0]


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
        (
            ("Wan", "How many of 81 frames fit, at 480x832 / at 720x1280", _frames),
            ("Qwen3", "How many of 32,768 tokens fit", _tokens),
        ),
        1,
    ):
        sections += [f"## {number}. {family}\n", f"{what}.\n", _table(family, results, lines, cell)]
    capped = [case for case in results["cases"] if case.get("cap_gib")]
    if capped:
        sections += [CAPPED, _capped(capped)]
    sections += [f"## {4 if capped else 3}. Measured\n", _measured(results, lines), section()]
    return "\n".join(sections)


def _table(family: str, results: dict[str, Any], lines: dict[tuple[str, str], Line], cell: Callable[[Line, float], str]) -> str:
    rows = [f"| | | weights | {' | '.join(f'{size} GB ({gpu})' for size, gpu in GPUS.items())} |", "|---" * (3 + len(GPUS)) + "|"]
    for model, weights in results["weights"].items():
        methods = [method for name, method in lines if name == model]
        # Whether the weights alone fit is arithmetic.
        methods += [method for method in ALWAYS if method not in methods and not model.startswith("Wan 2.2")]
        for method in sorted(methods, key=list(STATIC).index):
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


def _capped(cases: list[dict[str, Any]]) -> str:
    rows = ["| | | GiB | tokens: peak, GiB | reserved, GiB | s a step |", "|---" * 6 + "|"]
    for case in cases:
        points = zip(case["tokens"], case["peak_bytes"], strict=True)
        reserved = [x for x in case["reserved_bytes"] if x is not None]
        cells = [
            case["model"],
            case["method"],
            str(case["cap_gib"]),
            "; ".join(f"{n:,}: " + ("does not fit" if peak is None else f"{peak / 2**30:.2f}") for n, peak in points),
            f"{max(reserved) / 2**30:.2f}" if reserved else "",
            "" if case["seconds"] is None else f"{case['seconds']:.1f}",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, ""])


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
