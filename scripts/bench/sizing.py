"""Measure how much memory a training step takes, for docs/SIZING.md: which model, how trained, at what length, fits which GPU.

python -m scripts.bench.sizing measure docs/benchmarks/h200_memory.json --seconds 120
python -m scripts.bench.sizing report docs/benchmarks/h200_memory.json

`measure` runs the recipes' own loop and objectives for a few steps of growing length, on models of the real configs with random
weights that are made on the GPU, and writes the peak of memory at each length. It writes after each model and goes on where it
stopped. A length that does not fit is written down as such, and the longer ones with it. `report` writes docs/SIZING.md.
`--tiny` runs small models, to see that all of it works; on a CPU no memory is measured.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import WanTransformer3DModel
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, Qwen3Config

from qat_recipes.tasks.flow_matching import FlowMatching, TimestepSettings, noise_levels
from qat_recipes.tasks.language_modeling import LanguageModeling, NextToken
from qat_recipes.tasks.video_diffusion import VideoDiffusion
from qat_recipes.training.adapters import LoraSettings
from qat_recipes.training.loop import train
from qat_recipes.training.task import FineTuning, FineTuningSettings, ModelSettings
from scripts.arguments import new_parser
from scripts.bench.model_configs import CONFIGS, TINY_CONFIGS
from scripts.bench.sizing_report import FILE, report

LORA = LoraSettings(rank=16, alpha=32.0)
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "distillation": {"distillation": 1.0},
    "LoRA": {"lora": LORA},
    "LoRA distillation": {"lora": LORA, "distillation": 1.0},
}


class Measured(FineTuning[FineTuningSettings]):
    """A model with random weights, and one sample a step. The shortest comes twice: step 1 makes the optimizer states."""

    config: dict[str, int]
    """Of the model, by name in MODELS."""
    eval_batch_size = 1

    def __init__(self, settings: FineTuningSettings, config: dict[str, int], tokens: Sequence[int], device: torch.device) -> None:
        self.config, self.device, self.eval_data = config, device, {}
        self.train_data = [self.sample(number) for number in (tokens[0], *tokens)]
        super().__init__(settings)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def load(self, component: str | None) -> torch.nn.Module:
        with self.device:
            return self.random(self.config, self.settings.load_dtype)

    @staticmethod
    def random(config: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
        """A model on the default device."""
        raise NotImplementedError

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        """A sample of so many tokens."""
        raise NotImplementedError

    def batches(self, start: int, stop: int) -> BatchSampler:
        return BatchSampler(range(start, stop), 1, drop_last=True)

    def export(self, *_: Any) -> None:
        """Nobody needs random weights."""


class MeasuredText(Measured):
    """Qwen3 learns from one document."""

    lora_targets, tokens = LanguageModeling.lora_targets, staticmethod(LanguageModeling.tokens)
    objective = NextToken()

    @staticmethod
    def random(config: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(Qwen3Config(**config), dtype=dtype)

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(self.config["vocab_size"], (tokens,)), "position_ids": torch.arange(tokens)}


class MeasuredVideo(Measured):
    """Wan learns from one clip of 480x832, 1,560 tokens a latent frame."""

    lora_targets, tokens = VideoDiffusion.lora_targets, VideoDiffusion.tokens
    objective = FlowMatching(TimestepSettings(), *noise_levels(None, 3.0))

    @staticmethod
    def random(config: dict[str, int], dtype: torch.dtype) -> torch.nn.Module:
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = WanTransformer3DModel(**config)
        finally:
            torch.set_default_dtype(default)
        # As from_pretrained does.
        kept = set(model._keep_in_fp32_modules)
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model

    def sample(self, tokens: int) -> dict[str, torch.Tensor]:
        return {"latents": torch.randn(16, tokens // 1560, 60, 104), "prompt_embeds": torch.randn(512, self.config["text_dim"])}


class Model(NamedTuple):
    """What is measured."""

    kind: type[Measured]
    config: dict[str, int]


def _models(configs: dict[str, dict[str, int]]) -> dict[str, Model]:
    return {name: Model(MeasuredVideo if name.startswith("Wan") else MeasuredText, config) for name, config in configs.items()}


MODELS, TINY = _models(CONFIGS), _models(TINY_CONFIGS)
_VIDEO, _TEXT = (7800, 17_160, 32_760), (4096, 8192, 16_384)
CASES: list[tuple[str, str, tuple[int, ...]]] = [
    ("Wan 2.1 1.3B", "full", _VIDEO),
    ("Qwen3 14B", "LoRA", _TEXT),
    ("Qwen3 0.6B", "full", _TEXT),
    ("Wan 2.1 14B", "LoRA", (4680, 10_920, 20_280)),
    ("Qwen3 4B", "full", _TEXT),
    ("Qwen3 1.7B", "full", _TEXT),
    ("Wan 2.1 1.3B", "LoRA", _VIDEO),
    ("Qwen3 8B", "LoRA", _TEXT),
    ("Wan 2.1 1.3B", "distillation", _VIDEO),
    ("Qwen3 0.6B", "distillation", _TEXT),
    ("Qwen3 1.7B", "distillation", _TEXT),
    ("Qwen3 4B", "LoRA", _TEXT),
    ("Qwen3 4B", "distillation", _TEXT),
    ("Qwen3 1.7B", "LoRA", _TEXT),
    ("Qwen3 0.6B", "LoRA", _TEXT),
    ("Qwen3 14B", "LoRA distillation", _TEXT),
    ("Qwen3 8B", "LoRA distillation", _TEXT),
]
"""The most important first: model, method, and lengths in tokens."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure or report."""
    parser = new_parser("scripts.bench.sizing", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="write peaks of memory to FILE")
    measuring.add_argument("file", type=Path, metavar="FILE")
    measuring.add_argument("--seconds", type=float, default=float("inf"), help="start no other model after so many")
    measuring.add_argument("--tiny", action="store_true", help="small models")
    reporting = commands.add_parser("report", help=f"write {FILE.name} from FILE")
    reporting.add_argument("file", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if options.command == "report":
        FILE.write_text(report(options.file), encoding="utf-8")
        return
    models = TINY if options.tiny else MODELS
    cases = [(name, method, (1560, 3120)) for name in TINY for method in METHODS] if options.tiny else CASES
    measure(options.file, models, cases, options.seconds)


def measure(file: Path, models: dict[str, Model], cases: list[tuple[str, str, tuple[int, ...]]], seconds: float) -> None:
    """Add to a file what it does not have yet.

    Raises:
        ValueError: it comes from another machine, or other versions.
    """
    about = machine()
    results = {"about": about, "weights": {name: weights(model) for name, model in models.items()}, "cases": []}
    if file.exists():
        results |= json.loads(file.read_text(encoding="utf-8"))
        if results["about"] != about:
            raise ValueError(f"{file}: measured on {results['about']}, and this is {about}; choose another file")
    done = {(case["model"], case["method"]) for case in results["cases"]}
    began = time.perf_counter()
    for name, method, tokens in cases:
        spent = time.perf_counter() - began
        if (name, method) in done:
            continue
        if spent > seconds:
            print(f"{spent:.0f} s are over; run it again for the rest", flush=True)
            return
        free_memory()
        peaks = peaks_of(name, models[name], method, tokens)
        results["cases"].append({"model": name, "method": method, "tokens": list(tokens), "peak_bytes": peaks})
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        nothing = "does not fit" if torch.cuda.is_available() else "ran, not measured on a CPU"
        texts = [nothing if peak is None else f"{peak / 2**30:.2f} GiB" for peak in peaks]
        shown = ", ".join(f"{number}: {text}" for number, text in zip(tokens, texts, strict=True))
        print(f"{name}, {method}: {shown} ({time.perf_counter() - began - spent:.1f} s)", flush=True)


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device} | {name: version(name) for name in ("torch", "transformers", "diffusers", "peft", "accelerate")}


def weights(model: Model) -> int:
    """The number of weights, without making any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model.kind.random(model.config, torch.bfloat16).parameters())


def peaks_of(name: str, model: Model, method: str, tokens: Sequence[int]) -> list[int | None]:
    """Peak bytes on the GPU up to a training step of each length, ascending; None where it does not fit, or on a CPU."""
    is_measured = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        settings = FineTuningSettings(
            output_dir=folder,
            steps=len(tokens) + 1,
            batch_size=1,
            learning_rate=1e-6,
            mixed_precision="bf16",
            fused_optimizer=True,
            model=ModelSettings(path=name, gradient_checkpointing=True),
            **METHODS[method],
        )

        def make_task(accelerator: Accelerator) -> Measured:
            return model.kind(settings, model.config, tokens, accelerator.device)

        with contextlib.suppress(torch.OutOfMemoryError):
            train(settings, make_task)
        log = Path(folder) / "metrics.jsonl"
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    peaks = [round(record["peak_memory_gib"] * 2**30) if is_measured else None for record in records[1:]]
    return peaks + [None] * (len(tokens) - len(peaks))


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
