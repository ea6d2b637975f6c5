"""Check 4-bit attention, then time it against PyTorch's attention, interleaved in one run.

python -m scripts.bench attention --json attention.json
python -m scripts.bench attention --shape 1,12,12,32760,32760,128 --shape 2,40,8,4096,4096,128,causal
python -m scripts.bench attention --preset kv_nvfp4 --shape 1,40,8,4096,4096,128,causal
python -m scripts.bench inference --json inference.json
python -m scripts.bench quantize
python -m scripts.bench report attention.json --png attention.png

A shape is batch, query heads, key heads, queries, keys, head dim, and `causal`, `packed` or `forward` (without a backward) if
it is so; `packed` cuts the batch's tokens into documents of uneven lengths; `causal,window=1024` and `causal,block_size=1560`
are the masks of `qat_kernels.attention`. Each of our implementations is first compared with the float32 reference on a part of
the very problem that is timed (docs/NUMERICS.md, section 7); where a bound does not hold nothing is timed. Prints device,
versions, and for each shape the median and the spread (quartiles) of forward and of forward with backward, the bytes that a
forward keeps for its backward, and the peak of both. TFLOP/s count 4 B H Lq Lk D for a forward, half of that if it is causal,
and 3.5 times as much with backward. Other packages' attention joins where it is installed.

`inference` times what can run without gradients: the kernel for FP4 units, emulated where there are none, with P and V in NVFP4
and in BF16, and the training kernel; each quantizes its inputs first, in the time that is shown.

The JSON is written after every shape. `report` makes a table in Markdown from it, and a picture; from scripts.bench.decode's too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from qat_kernels import QuantSpec
from qat_kernels.spec import Preset
from qat_patch.bench.attention import TRAINING, attention, inference
from qat_patch.bench.harness import machine, number_of_rounds, write
from qat_patch.bench.shapes import CPU_SHAPES, FIGURE_5_SHAPES, GPU_SHAPES, INFERENCE_SHAPES, Shape
from scripts.arguments import new_parser
from scripts.bench.quantize import quantize
from scripts.bench.report import report


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, time and print. Returns the measurements."""
    parser = new_parser("scripts.bench", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, text in (
        ("attention", "time attention, forward and backward"),
        ("inference", "time attention without gradients"),
        ("quantize", "time the quantization kernels against a copy"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--shape", action="append", type=Shape.parse, help="default: those of the published models")
        command.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
        command.add_argument(
            "--rounds", type=number_of_rounds, default=20, help="how often each attention is timed (default: 20)"
        )
        command.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
        if name == "attention":
            command.add_argument("--preset", action="append", default=[], choices=get_args(Preset), help="time this preset too")
            command.add_argument("--figure-5", action="store_true", help="time the grid of the paper's figure 5 instead")
    command = commands.add_parser("report", help="a table and a picture of earlier results")
    command.add_argument("file", type=Path)
    command.add_argument("--png", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.command == "report":
        results = json.loads(options.file.read_text(encoding="utf-8"))
        print(report(results, options.png))
        return results
    about = machine(device, options.dtype)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    defaults = CPU_SHAPES if device == "cpu" else FIGURE_5_SHAPES if getattr(options, "figure_5", False) else GPU_SHAPES
    if options.command == "inference":
        defaults = INFERENCE_SHAPES
    presets = {name: {"spec": QuantSpec(preset=name)} for name in getattr(options, "preset", [])}
    training = partial(attention, variants=TRAINING | presets)
    measured = {"attention": training, "inference": inference, "quantize": quantize}[options.command]
    dtype = getattr(torch, options.dtype)
    results = []
    for shape in options.shape or [Shape.parse(text) for text in defaults]:
        print(f"\n{shape}", flush=True)
        try:
            measurements = measured(shape, device, dtype, options.rounds)
        except ValueError as error:
            raise SystemExit(str(error)) from error
        results += [about | shape._asdict() | each for each in measurements]
        write(results, options.json)
    return results


if __name__ == "__main__":
    main()
