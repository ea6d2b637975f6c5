"""qat-patch bench figure-5: the paper's figure 5 on this GPU. Results are checked first; nothing wrong is timed.

It compares our kernels with PyTorch's attention, and with FlashAttention, SageAttention3 and FlashInfer if installed.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from qat_patch.bench.figure_5 import SHAPES, draw, figure_5, table
from qat_patch.bench.harness import write


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and time the kernels, print and write the results, and draw the picture.

    Raises:
        ValueError: it cannot run here, our results are wrong, or the picture cannot be drawn (checked before timing).
    """
    options = _parse(arguments)
    if not options.no_png and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--png: the picture needs matplotlib: pip install 'qat-patch[figure]', or pass --no-png")
    for file in (options.json, options.png):
        if not file.absolute().parent.is_dir():
            raise ValueError(f"bench: expected a file in a folder that exists, got {file}")
    if any(number < 1 for number in (options.batch, options.heads, options.rounds - 1, *options.length)):
        raise ValueError("bench: --batch, --heads and --length: expected numbers from 1 up, and from 2 up for --rounds")
    shapes = [
        SHAPES[0]._replace(batch=options.batch, heads=options.heads, key_heads=options.heads, queries=n, keys=n, head_dim=dim)
        for dim in options.head_dim
        for n in options.length
    ]
    results = figure_5(shapes, options.rounds, lambda results: write(results, options.json))
    if not results:
        raise ValueError("bench figure-5: nothing fits into the memory of this GPU; pass a smaller --batch or --length")
    print(f"\nTFLOP/s\n\n{table(results)}\n\n{options.json}")
    if not options.no_png:
        draw(results, options.png)
        print(options.png)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat-patch bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["figure-5"], help="the benchmark")
    lengths, dims = (sorted({getattr(shape, field) for shape in SHAPES}) for field in ("keys", "head_dim"))
    parser.add_argument("--length", type=int, nargs="+", default=lengths, metavar="N", help="tokens (default: the paper's)")
    parser.add_argument("--head-dim", type=int, nargs="+", default=dims[::-1], metavar="D", help="(default: 128 64)")
    parser.add_argument("--batch", type=int, default=SHAPES[0].batch, metavar="N", help="(default: 16)")
    parser.add_argument("--heads", type=int, default=SHAPES[0].heads, metavar="N", help="(default: 16)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="how often each shape is timed (default: 20)")
    parser.add_argument("--json", type=Path, default=Path("figure-5.json"), metavar="FILE", help="(default: figure-5.json)")
    parser.add_argument("--png", type=Path, default=Path("figure-5.png"), metavar="FILE", help="(default: figure-5.png)")
    parser.add_argument("--no-png", action="store_true", help="draw nothing")
    return parser.parse_args(arguments)
