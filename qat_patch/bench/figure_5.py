"""Figure 5 of the paper on this GPU: the speed of attention without gradients by length and head dim, ours and others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qat_kernels import QuantSpec
from qat_kernels.dispatch import how, why_not

from .attention import INFERENCE, check_all, timed
from .harness import machine
from .shapes import FIGURE_5_SHAPES, Shape

Result = dict[str, Any]
OURS = {name: INFERENCE[name] for name in ("fp4", "triton")}
PUBLISHED = {
    "FlashAttention-2": {128: (196, 211, 218, 222, 223, 224), 64: (209, 224, 230, 231, 233, 233)},
    "SageAttention3": {128: (243, 360, 490, 593, 658, 688), 64: (245, 311, 377, 437, 477, 496)},
    "Attn-QAT": {128: (404, 550, 645, 708, 746, 760), 64: (327, 421, 477, 513, 535, 545)},
}
"""TFLOP/s that the paper gives for an RTX 5090, at 1k, 2k, 4k, 8k, 16k and 32k tokens, by head dim."""
OUT_OF_MEMORY = object()
SHAPES = tuple(Shape.parse(text) for text in FIGURE_5_SHAPES)


def figure_5(shapes: Sequence[Shape], rounds: int, write: Callable[[list[Result]], object]) -> list[Result]:
    """Check all shapes, then time and print them.

    Args:
        shapes: shapes without a backward.
        rounds: how often each shape is timed.
        write: called after every shape with all results so far.

    Raises:
        ValueError: the kernels cannot run here, or their results are wrong. Then nothing is timed.
    """
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16
    if (problem := why_not("fp4", torch.device(device), dtype, QuantSpec(), False)) is not None:
        if device == "cpu":
            problem = "expected an NVIDIA GPU from sm_80 on, got none that PyTorch finds; qat-patch doctor shows what there is"
        raise ValueError(f"bench figure-5: {problem}")
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    units = {dim: how("fp4", where, dim, QuantSpec()) for dim in sorted({shape.head_dim for shape in shapes}, reverse=True)}
    about = machine(device, "bfloat16")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print("\n".join(f"fp4 with head_dim {dim}: {words}" for dim, words in units.items()))
    left, results = [], []
    for shape in shapes:
        print(f"\nright? {shape}", flush=True)
        if _of_what_fits(check_all, shape, device, dtype, OURS) is not OUT_OF_MEMORY:
            left.append(shape)
    for shape in left:
        print(f"\n{shape}", flush=True)
        measured = _of_what_fits(timed, shape, device, dtype, rounds, OURS)
        if measured is OUT_OF_MEMORY:
            continue
        results += [about | shape._asdict() | each | _speed(shape, each) | {"fp4": units[shape.head_dim]} for each in measured]
        write(results)
    return results


def _of_what_fits(call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's result, or `OUT_OF_MEMORY`."""
    try:
        return call(*arguments)
    except torch.OutOfMemoryError:
        print("  left out: it does not fit into the memory of this GPU")
    torch.cuda.empty_cache()
    return OUT_OF_MEMORY


def _speed(shape: Shape, result: Result) -> Result:
    return {"tflops": shape.flops(False) / result["seconds"][1] / 1e12}


def table(results: list[Result]) -> str:
    """A Markdown table of TFLOP/s, with a row for each head dim and length."""
    names = list(dict.fromkeys(each["name"] for each in results))
    lines = ["| head dim | tokens | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for dim, length in dict.fromkeys((each["head_dim"], each["keys"]) for each in results):
        found = {each["name"]: each["tflops"] for each in results if (each["head_dim"], each["keys"]) == (dim, length)}
        cells = [f"{found[name]:.1f}" if name in found else "" for name in names]
        lines.append(f"| {dim} | {length:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: list[Result], png: Path) -> None:
    """One plot for each head dim; the paper's numbers are dashed. Needs matplotlib."""
    from matplotlib.figure import Figure

    dims = list(dict.fromkeys(each["head_dim"] for each in results))
    figure = Figure(figsize=(6 * len(dims), 4.5), layout="constrained")
    for axes, dim in zip(figure.subplots(1, len(dims), squeeze=False)[0], dims, strict=True):
        for name in dict.fromkeys(each["name"] for each in results):
            line = sorted((each["keys"], each["tflops"]) for each in results if (each["name"], each["head_dim"]) == (name, dim))
            axes.plot(*zip(*line, strict=True), marker="o", label=name) if line else None
        for name, by_dim in PUBLISHED.items():
            if dim in by_dim:
                axes.plot([1 << (10 + n) for n in range(6)], by_dim[dim], "--", alpha=0.5, label=f"{name}, RTX 5090 (paper)")
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_ylabel("TFLOP/s (4 B H L² D)")
        axes.set_title(f"head dim {dim}, {results[0]['device']}")
        axes.legend(fontsize="small")
    figure.savefig(png, dpi=120)
