"""Measure how much memory a training step takes, for docs/SIZING.md: which model, how trained, at what length, fits which GPU.

python -m scripts.bench.sizing measure docs/benchmarks/h200_memory.json --seconds 120
python -m scripts.bench.sizing report docs/benchmarks/h200_memory.json

`measure` runs the recipes' own loop and objectives for a few steps of growing length, on models of the real configs with random
weights. It writes the peak of memory at each length, what PyTorch's allocator had reserved, losses and seconds. A model is made
in the memory of the CPU, as `from_pretrained` does, and goes to the GPU as in a run. Where a claim is about a small GPU,
PyTorch's allocator gets no more than that (`torch.cuda.set_per_process_memory_fraction`). It writes after each model and goes on
where it stopped. A length that does not fit is written down as such, and the longer ones with it. `report` prints the
tables of a file; `make evidence` writes docs/SIZING.md.
`--tiny` runs small models, to see that all of it works; on a CPU no memory is measured.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from qat_recipes.tasks.fine_tuning import ModelSettings
from qat_recipes.training.loop import train
from scripts.arguments import new_parser
from scripts.bench.sizing_cases import CASES, METHODS, MODELS, TINY, Case, Measured, Model, tiny_cases
from scripts.bench.sizing_report import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or report."""
    parser = new_parser("scripts.bench.sizing", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="write peaks of memory to FILE")
    measuring.add_argument("file", type=Path, metavar="FILE")
    measuring.add_argument("--seconds", type=float, default=float("inf"), help="start no other model after so many")
    measuring.add_argument("--tiny", action="store_true", help="small models")
    reporting = commands.add_parser("report", help="print the tables of FILE")
    reporting.add_argument("file", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.command == "report":
        print(report(options.file))
        return
    if options.tiny:
        measure(options.file, TINY, tiny_cases(), options.seconds)
    else:
        measure(options.file, MODELS, CASES, options.seconds)


def measure(file: Path, models: dict[str, Model], cases: Sequence[Case], seconds: float) -> None:
    """Add to a file what it does not have yet.

    Raises:
        ValueError: it comes from another machine, or other versions.
        SystemExit: some could not be measured. The others were.
    """
    about, failed = machine(), []
    results: dict[str, Any] = {"about": about, "weights": {name: weights(model) for name, model in models.items()}, "cases": []}
    if file.exists():
        results |= {name: x for name, x in json.loads(file.read_text(encoding="utf-8")).items() if name != "weights"}
        if results["about"] != about:
            raise ValueError(f"{file}: measured on {results['about']}, and this is {about}; choose another file")
    done = {(case["model"], case["method"], case.get("cap_gib")) for case in results["cases"]}
    began = time.perf_counter()
    for case in cases:
        spent = time.perf_counter() - began
        if (case.model, case.method, case.cap_gib) in done:
            continue
        if spent > seconds:
            print(f"{spent:.0f} s are over; run it again for the rest", flush=True)
            break
        free_memory()
        try:
            found = measured(case, models[case.model])
        except (ValueError, RuntimeError, FloatingPointError) as error:
            print(f"{case}: not measured: {type(error).__name__}: {error}", flush=True)
            failed.append(str(case))
            continue
        results["cases"].append(asdict(case) | found)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        nothing = "does not fit" if torch.cuda.is_available() else "ran, not measured on a CPU"
        texts = [nothing if peak is None else f"{peak / 2**30:.2f} GiB" for peak in found["peak_bytes"]]
        shown = ", ".join(f"{number}: {text}" for number, text in zip(case.tokens, texts, strict=True))
        shown += "".join(f", {name} {x}" for name, x in found.items() if name != "peak_bytes")
        print(f"{case}: {shown} ({time.perf_counter() - began - spent:.1f} s)", flush=True)
    if failed:
        raise SystemExit(f"not measured: {'; '.join(failed)}")


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    about = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}
    for name in ("torch", "transformers", "diffusers", "peft", "accelerate", "bitsandbytes"):
        with contextlib.suppress(PackageNotFoundError):
            about[name] = version(name)
    return about


def weights(model: Model) -> int:
    """The number of weights, without making any."""
    with torch.device("meta"):
        one = sum(parameter.numel() for parameter in model.kind.random(model.config, torch.bfloat16).parameters())
    return one * len(model.kind.components)


def measured(case: Case, model: Model) -> dict[str, Any]:
    """What each length takes, ascending.

    Returns:
        `peak_bytes` on the GPU up to its training step, and `reserved_bytes` by the allocator; None where it does not fit, or on
        a CPU. `losses` of these steps. `seconds` of the longest, if it is timed.

    The shortest comes twice too (with both experts once each): step 1 makes the optimizer states.

    Raises:
        FloatingPointError: a loss is not finite.
    """
    is_measured = torch.cuda.is_available()
    steps = (case.tokens[0], *case.tokens, *case.tokens[len(case.tokens) - case.is_timed :])
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        changes = dict(METHODS[case.method])
        keep_attention = changes.pop("keep_attention", False)
        settings = model.kind.settings_type(
            output_dir=folder,
            steps=len(steps),
            batch_size=1,
            learning_rate=1e-6,
            mixed_precision="bf16",
            model=ModelSettings(path=case.model, gradient_checkpointing=True, keep_attention=keep_attention),
            fused_optimizer="optimizer" not in changes,
            **changes,
        )

        def make_task(accelerator: Accelerator) -> Measured:
            return model.kind(settings, model.config, steps, accelerator.device)

        try:
            with memory_limited(case.cap_gib):
                train(settings, make_task)
        except torch.OutOfMemoryError as error:
            print(f"{case}: {error}", file=sys.stderr, flush=True)
        log = Path(folder) / "metrics.jsonl"
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
        assert [record["step"] for record in records] == [*range(1, len(records) + 1)], "one record a step"
    last = records[-1] if is_measured and case.is_timed and len(records) == len(steps) else {}
    records = records[1 : len(case.tokens) + 1]
    absent = [None] * (len(case.tokens) - len(records))
    return {
        "peak_bytes": [_bytes(record["peak_memory_gib"]) if is_measured else None for record in records] + absent,
        "reserved_bytes": [_bytes(record["reserved_gib"]) if is_measured else None for record in records] + absent,
        "losses": [record["loss"] for record in records] + absent,
        "seconds": case.tokens[-1] / last["tokens_per_second"] if last else None,
    }


def _bytes(gib: float) -> int:
    return round(gib * 2**30)


@contextlib.contextmanager
def memory_limited(gib: int | None) -> Iterator[None]:
    """Inside, PyTorch's allocator gets no more than so many GiB of the GPU, and peaks are of what is done here."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties().total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else gib * 2**30 / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def free_memory() -> None:
    """Make room for the next model.

    Raises:
        RuntimeError: the last one is still there, and would count.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        if (left := torch.cuda.memory_allocated()) > 2**28:
            raise RuntimeError(f"sizing: {left / 2**30:.2f} GiB are still allocated; run it again, and it goes on from here")


if __name__ == "__main__":
    main()
