"""The tables of speed in README.md and docs/BENCHMARKS.md, from the JSON in docs/benchmarks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from qat_patch.bench.shapes import Shape
from scripts.bench.report import Table, attention_table, decode_table, generation_table, shape_of
from scripts.evidence.report.tables_and_figures import table
from scripts.paths import DOCS

FOLDER = DOCS / "benchmarks"
_FLASH_AND_CUDNN = {"sdpa flash": "FlashAttention-2", "sdpa cudnn": "cuDNN"}
_PYTORCH = {"sdpa": "PyTorch"}
_DECODING = {"bf16 sdpa cudnn": "cuDNN"}


def stored(file: str) -> Any:
    """A file of docs/benchmarks."""
    return json.loads((FOLDER / f"{file}.json").read_text(encoding="utf-8"))


def measurements(file: str) -> list[dict[str, Any]]:
    """The results of a benchmark."""
    found: list[dict[str, Any]] = stored(file)
    return found


def _speed(_: Any) -> str:
    """For README.md."""
    both = {"what": "forward+backward"}
    wan = both | {"queries": 32_760, "keys": 32_760, "heads": 12, "causal": False, "block_size": 1}
    long = both | {"batch": 1, "queries": 16_384, "heads": 40, "causal": True, "packed": False, "window": 0}
    cache = both | {"batch": 2, "queries": 4096, "heads": 40, "causal": True, "packed": False}
    decoding = {"batch": 32, "length": 32_768}
    attention = "attention, forward and backward"
    attended, trained, decoded = "scripts.bench attention", "scripts.bench.training", "scripts.bench.decode"
    rows = [
        _row(f"{attention}, Wan 2.1 1.3B (32,760 tokens)", "h200_attention", "ours", _FLASH_AND_CUDNN, wan, attended),
        _row(f"{attention}, 40/8 heads, 16,384 tokens, causal", "h200_attention", "ours", _FLASH_AND_CUDNN, long, attended),
        _row(
            "the same for a KV cache in NVFP4, 2 x 4,096 tokens",
            "h200_presets",
            "kv_nvfp4",
            _PYTORCH,
            cache,
            f"{attended} --preset kv_nvfp4",
        ),
        _row(
            "one training step, Wan 2.1 1.3B, all weights, 81 frames of 480x832", "h100_training", "4-bit", _PYTORCH, {}, trained
        ),
        _row("one training step, Qwen3-14B, LoRA, 4,096 tokens", "h200_training", "4-bit", _PYTORCH, {}, trained),
        _row("decoding, one step of attention, 32 x 32,768 tokens", "h200_decode", "fp4 cache", _DECODING, decoding, decoded),
    ]
    return table(("what", "GPU", "4-bit", "BF16", "command: `python -m`"), rows)


def _training(_: Any) -> str:
    """Training steps of whole models."""
    rows = []
    for what, file in (
        ("Wan 2.1 1.3B, all weights, 81 frames of 480x832", "h100_training"),
        ("Qwen3-14B, LoRA of rank 16, 4,096 tokens", "h200_training"),
    ):
        found = {each["name"]: each for each in measurements(file)}
        theirs, ours = found["sdpa"], found["4-bit"]
        slower = f"{ours['seconds'][1] / theirs['seconds'][1]:.2f} x"
        memory = f"{ours['peak_bytes'] / 2**30:.1f} GiB, {ours['peak_bytes'] / theirs['peak_bytes']:.2f} x"
        rows.append((what, _gpu(ours), _time(theirs), _time(ours), slower, memory))
    return table(("step", "GPU", "SDPA", "4-bit", "", "memory"), [*rows])


def _presets(_: Any) -> str:
    """Attention for servers, forward and backward, and PyTorch's."""
    names = {"kv_nvfp4": "`kv_nvfp4`", "fa4_fp4": "`fa4_fp4`", "sage3": "`sage3`", "ours": "`nvfp4`"}
    names |= {"sdpa": "BF16, what PyTorch chooses", "sdpa cudnn": "BF16, cuDNN", "sdpa flash": "BF16, FlashAttention-2"}
    by_shape: dict[Shape, dict[str, str]] = {}
    for each in measurements("h200_presets"):
        if each["what"] == "forward+backward":
            name = {"varlen_attn": "sdpa flash"}.get(each["name"], each["name"])  # the same kernel, for packed samples
            by_shape.setdefault(shape_of(each), {})[name] = f"{1e3 * each['seconds'][1]:.2f}"
    rows = [(str(shape), *(found.get(name, "") for name in names)) for shape, found in by_shape.items()]
    return table(("shape", *names.values()), [*rows])


def _row(what: str, file: str, ours: str, theirs: Mapping[str, str], wanted: Mapping[str, Any], command: str) -> tuple[str, ...]:
    """Our time and those of others, of the only measurements in a file that have the wanted values.

    Args:
        what: what is timed, in words.
        file: of `measurements`.
        ours: the name of our implementation there.
        theirs: the names of the others there, and in words.
        wanted: what else the measurements have.
        command: the program that measured it.
    """
    found = {}
    for name in (ours, *theirs):
        (found[name],) = [each for each in measurements(file) if each["name"] == name and wanted.items() <= each.items()]
    others = ", ".join(f"{_time(found[name])} {words}" for name, words in theirs.items())
    return what, _gpu(found[ours]), _time(found[ours]), others, f"`{command}`"


def _gpu(result: dict[str, Any]) -> str:
    """Such as H100."""
    return str(result["device"]).removeprefix("NVIDIA ").split()[0]


def _time(result: dict[str, Any]) -> str:
    """The median, with three digits: in seconds for training steps."""
    if "problem" in result:
        return f"{result['seconds'][1]:#.3g} s"
    return f"{result['ms'] if 'ms' in result else 1e3 * result['seconds'][1]:#.3g} ms"


def _reported(file: str, tabulate: Callable[[list[dict[str, Any]]], Table], _: Any) -> str:
    """What `python -m scripts.bench report` prints."""
    return "\n".join(tabulate(measurements(file))[0])


TABLES = {
    "speed": _speed,
    "training": _training,
    "h200_presets": _presets,
    "h200_attention": partial(_reported, "h200_attention", attention_table),
    "h200_attention_triton39": partial(_reported, "h200_attention_triton39", attention_table),
    "h100_attention": partial(_reported, "h100_attention", attention_table),
    "h100_figure5": partial(_reported, "h100_figure5", attention_table),
    "h100_inference": partial(_reported, "h100_inference", attention_table),
    "h200_decode": partial(_reported, "h200_decode", decode_table),
    "h100_decode": partial(_reported, "h100_decode", decode_table),
    "h100_generate": partial(_reported, "h100_generate", generation_table),
}
FIGURES: dict[str, Any] = {}
