"""Experiment 1: what each attention costs a language model that was never trained for it.

python -m scripts.evidence.language
python -m scripts.evidence.untrained
python -m scripts.evidence.untrained --device cpu --windows 4 --length 256 --results build/untrained_small.json

Held-out loss and KL to the model's own logits, window by window, of SmolLM2-135M in float32: one entry an attention, so that
differences of any two are paired.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from qat_recipes.training.settings import TrainingSettings
from scripts.evidence.attention.by_name import attention_in
from scripts.evidence.estimates import estimate
from scripts.evidence.fine_tuning import OBJECTIVE, measure_windows
from scripts.evidence.language import FOLDER as LANGUAGE
from scripts.evidence.language import Language
from scripts.evidence.results import Entry, Results, command_line, work_through

OURS = "nvfp4"
ATTENTIONS = {
    "original": "original",
    "nvfp4": "this definition",
    "nvfp4+k_shift": "with `k_shift`",
    "nvfp4+rotate": "with `rotate`",
    "nvfp4+four_over_six": "with `four_over_six`",
    "nvfp4+rotate+k_shift": "with `rotate`, `k_shift`",
    "nvfp4+four_over_six+k_shift": "with `four_over_six`, `k_shift`",
    "nvfp4+rotate+four_over_six": "with `rotate`, `four_over_six`",
    "nvfp4+rotate+four_over_six+k_shift": "with all three",
    "nvfp4+rotate+four_over_six+k_shift+q_shift": "with all four: a mean of Q for each key head too",
    "nvfp4+rotate+four_over_six+k_shift/without_2": "with all three, the two of 30 layers that lose most left out",
    "definition+q_shift": "with a calibrated mean of Q",
    "definition+k_shift+q_shift": "with calibrated means of K and Q",
    "definition+rotate+four_over_six+k_shift": "with all three, in another implementation",
    "definition+rotate+four_over_six+k_shift+q_shift": "the same, and a calibrated mean of Q",
    "definition+rotate+four_over_six+k_shift+q_shift_by_block": "the same, and a calibrated mean of Q for each 128 positions",
    "pv_bf16": "`nvfp4_qk`: only Q and K quantized",
    "pv_bf16+rotate+four_over_six+k_shift": "`nvfp4_qk` with all three",
    "p_only": "only P quantized",
    "v_only": "only V quantized",
    "sage3": "SageAttention3's scheme",
    "public_training": "public kernels: training grid",
    "public_serving": "public kernels: serving grid",
    "single_level": "this definition, but single-level P (g = 1)",
    "single_level_no_floor": "this definition, but single-level P without the clamp",
    "v_along_head_dim": "this definition, but V along the head dim",
    "no_kept_groups": "this definition, but no kept groups",
}
"""What is measured, and what the report calls it."""
CALIBRATION_WINDOWS = 8
"""Windows of training text for `k_shift`."""


class Measurement:
    """Measures one attention on the same windows as all others."""

    def __init__(self, language: Language, device: str, length: int, count: int, batch: int) -> None:
        self.model = language.model(device)
        self.windows = language.windows("test", length, count).to(device)
        self.calibration = language.windows("train", length, min(CALIBRATION_WINDOWS, count)).to(device)
        self.batch = batch
        self.settings = TrainingSettings(output_dir="", steps=1, batch_size=1, learning_rate=1.0, mixed_precision=None)

    def __call__(self, name: str) -> Entry:
        batches = [{"input_ids": ids} for ids in self.calibration.split(self.batch)]
        with attention_in(self.model, name, batches) as handle:

            def teacher(model, inputs):
                with torch.no_grad(), handle.disabled():
                    return OBJECTIVE.outputs(model, inputs)

            found = measure_windows(self.model, {name: contextlib.nullcontext}, self.windows, teacher, self.settings, self.batch)
        count, length = self.windows.shape
        settings = {"text": "test", "windows": count, "length": length, "dtype": "float32", "calibration": len(self.calibration)}
        return {"loss": found[f"loss_{name}"], "kl": found[f"kl_{name}"], "settings": settings}


def table(results: Mapping[str, Entry]) -> str:
    """A row an attention: extra loss, KL, and how much more KL than this definition has, each paired over windows."""
    original, ours = results["original"]["loss"], results[OURS]["kl"]
    about = results["original"]["settings"]
    loss = estimate([original]).mean
    lines = [
        f"| SmolLM2-135M, {about['windows']} x {about['length']} tokens, before training | extra loss ({loss:.4f}) | "
        "KL to the original logits | KL against this definition |",
        "|---|---|---|---|",
    ]
    for name, title in ATTENTIONS.items():
        if name == "original" or name not in results:
            continue
        entry = results[name]
        extra = _cell(a - b for a, b in zip(entry["loss"], original, strict=True))
        against = "" if name == OURS else _cell((a - b for a, b in zip(entry["kl"], ours, strict=True)), sign="+")
        lines.append(f"| {title} | {extra} | {_cell(entry['kl'])} | {against} |")
    return "\n".join(lines)


def _cell(values: Iterable[float], sign: str = "") -> str:
    mean, error = estimate([list(values)])
    return f"{mean:{sign}.4f} ± {error:.4f}"


def make_measurement(folder: Path, device: str, length: int, count: int, batch: int) -> Measurement:
    """A measurement on a prepared folder."""
    return Measurement(Language(folder), device, length, count, batch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print the table."""
    parser = command_line(
        "untrained", "untrained_language.json", "experiment 1: attentions of a language model that was not trained for them"
    )
    parser.add_argument("--language", type=Path, default=LANGUAGE, help="what evidence.language prepared; default %(default)s")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a window; default %(default)s")
    parser.add_argument("--windows", type=int, default=24, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="windows at once; default %(default)s")
    options = parser.parse_args(arguments)
    results = Results(options.results)
    prepare = partial(make_measurement, options.language, options.device, options.length, options.windows, options.batch)
    work_through(
        results,
        lambda _: ((name, name) for name in ATTENTIONS),
        prepare,
        device=options.device,
        workers=options.workers,
        seconds=options.seconds,
    )
    if {"original", OURS} <= set(results):
        print(table(results))


if __name__ == "__main__":
    main()
