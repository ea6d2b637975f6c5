"""Experiment 2: what training through 4-bit attention wins back, on SmolLM2-135M.

python -m scripts.evidence.language
python -m scripts.evidence.trained --workers 4 --seconds 300

Runs are listed by importance; `--seconds` says when no more are started, and a second start goes on. Each trains equally long
on the same text in the same order (by seed) by one method:

- control: the task loss (next token), through original attention
- task: the task loss, through 4-bit attention
- distill: KL to the starting model in original attention, through 4-bit attention
- mix: the mean of both losses, through 4-bit attention; control_mix: the same through original attention

The learning rate of each method, for full fine-tuning and LoRA apart, is the best on a grid of half decades for its own objective
(through the attention that it trains through) on validation plays, with seed 0, until both neighbours are worse. Reported is what
the end of a run measures on test plays.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qat_recipes.tasks.language_modeling import LanguageModeling
from qat_recipes.training.adapters import LoraSettings, add_adapters
from qat_recipes.training.optimization import compile_blocks
from qat_recipes.training.settings import TrainingSettings
from scripts.evidence.attention.by_name import attention_in
from scripts.evidence.fine_tuning import Attention, Windows, fine_tune, frozen_teacher, means, measure_windows
from scripts.evidence.language import FOLDER as LANGUAGE
from scripts.evidence.language import Language
from scripts.evidence.results import Entry, Results, command_line, work_through

METHODS = {
    "control": {"attention": "original"},
    "task": {},
    "distill": {"distillation": 1.0},
    "mix": {"distillation": 0.5},
    "control_mix": {"attention": "original", "distillation": 0.5},
}
PLAIN, ALL = "nvfp4", "nvfp4+rotate+k_shift+four_over_six"
OPTIONS = (PLAIN, "nvfp4+rotate", "nvfp4+k_shift", "nvfp4+four_over_six", ALL)
"""The attentions of attention/by_name.py that are trained through."""
RATES = {"full": (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "lora": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
FIRST_RATES = {"full": (3e-5, 1e-4), "lora": (3e-4, 1e-3)}
LORA = LoraSettings(rank=16, alpha=32)
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How long runs are, and how much is measured."""

    length: int = 1024
    """Tokens in a window."""
    batch: int = 4
    """Windows in a step."""
    steps: int = 120
    test: int = 24
    """Windows that the end of a run is measured on."""
    validation: int = 8
    """Windows of the curve."""
    at_once: int = 4
    """Windows that are measured together."""
    everywhere: bool = False
    """Measure the end of every run in all options, not that of controls alone."""


SIZES = {
    "main": Size(),
    # As many tokens a step, in one window of the length at which the public backward has lost dV.
    "long": Size(length=4096, batch=1, steps=60, test=12, validation=2, at_once=1),
    "short": Size(steps=40),
    "longer": Size(steps=360),
}
OTHER_STEPS = ("short", "longer")
"""Sizes that differ from `main` in their steps alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    method: str
    weights: str = "full"
    option: str = PLAIN
    size: str = "main"
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.size}/{self.weights}/{self.method}/{self.option}/rate={self.rate:g}/seed={self.seed}"


def plan(results: Mapping[str, Entry]) -> Iterator[tuple[str, Run | str]]:
    """All runs that can be named so far, the most important first; the first of all measures the model as it is."""
    yield "untrained/main", "main"

    def seeds(methods: Iterable[str], count: int = len(SEEDS), **options: Any) -> Iterator[tuple[str, Run]]:
        for seed in SEEDS[:count]:
            for method in methods:
                rate = best_rate(results, method, options.get("weights", "full"))
                if rate is not None:
                    run = Run(method=method, rate=rate, seed=seed, **options)
                    yield run.key, run

    def sweep(methods: Iterable[str], weights: str) -> Iterator[tuple[str, Run]]:
        for method in methods:
            for rate in next_rates(results, method, weights):
                run = Run(method=method, weights=weights, rate=rate, seed=SEEDS[0])
                yield run.key, run

    three = ("distill", "task", "control")
    yield from sweep(three, "full")
    yield from seeds(three)
    yield from seeds(("distill", "task"), option=ALL)
    yield "untrained/long", "long"
    yield from seeds(three, size="long")
    yield from sweep(three, "lora")
    yield from seeds(three, weights="lora")
    for size in OTHER_STEPS:
        yield from seeds(three, 1, size=size)
        yield from seeds(("distill", "task"), 1, option=ALL, size=size)
    yield from sweep(("mix", "control_mix"), "full")
    yield from seeds(("mix", "control_mix"))
    yield from seeds(("distill", "task"), weights="lora", option=ALL)
    for option in OPTIONS[1:-1]:
        yield from seeds(("distill", "task"), option=option)


def tried_rates(
    results: Mapping[str, Entry], method: str, weights: str, option: str = PLAIN, size: str = "main"
) -> dict[float, float]:
    """The method's own objective on validation text at the end of the runs of the sweep, by learning rate; diverged: infinite."""
    found = {}
    for rate in RATES[weights]:
        entry = results.get(Run(method=method, weights=weights, option=option, size=size, rate=rate, seed=SEEDS[0]).key)
        if entry is not None:
            value = objective_of(method, entry["curve"][-1], option)
            found[rate] = value if math.isfinite(value) else math.inf
    return found


def objective_of(method: str, measured: dict[str, float], option: str = PLAIN) -> float:
    """What a method minimizes, in the attention that it trains through."""
    chosen = METHODS[method]
    attention, distillation = chosen.get("attention", option), chosen.get("distillation", 0.0)
    return (1 - distillation) * measured[f"loss_{attention}"] + distillation * measured[f"kl_{attention}"]


def next_rates(results: Mapping[str, Entry], method: str, weights: str, option: str = PLAIN) -> list[float]:
    """Learning rates of the sweep: those of its start, then the neighbours of the best."""
    tried, grid = tried_rates(results, method, weights, option), RATES[weights]
    if not set(FIRST_RATES[weights]) <= tried.keys():
        return list(FIRST_RATES[weights])
    index = grid.index(min(tried, key=tried.get))
    return sorted({*tried, *grid[max(0, index - 1) : index + 2]})


def best_rate(results: Mapping[str, Entry], method: str, weights: str, option: str = PLAIN) -> float | None:
    """The best learning rate, or None as long as the sweep goes on."""
    tried = tried_rates(results, method, weights, option)
    done = tried and set(next_rates(results, method, weights, option)) == tried.keys()
    return min(tried, key=tried.get) if done else None


class Trainer:
    """Trains from one starting model again and again; what `work_through` calls in each worker."""

    def __init__(
        self,
        language: Language,
        device: str,
        sizes: dict[str, Size],
        options: Sequence[str] = OPTIONS,
        compiler: str | None = None,
    ) -> None:
        """`options`: what the model is measured in before training, and controls of the size `main` after it. `compiler`: the
        backend of torch.compile for training; measured is without."""
        self.options, self.compiler = options, compiler
        self.language, self.device, self.sizes = language, torch.device(device), sizes
        self.start = language.model(self.device).requires_grad_(False)
        self.teacher = frozen_teacher(self.start)

    def __call__(self, unit: Run | str) -> Entry:
        return self.untrained(self.sizes[unit]) if isinstance(unit, str) else self.run(unit)

    def untrained(self, size: Size) -> Entry:
        """The starting model in every option."""
        settings = self.settings(Run(method="task", rate=1.0, seed=0), size)
        return {"test": self.test(copy.deepcopy(self.start), self.options, size, settings), "settings": dataclasses.asdict(size)}

    def run(self, run: Run) -> Entry:
        """Train, and measure the end on test text: in the option of the run, and controls in others too."""
        size = self.sizes[run.size]
        settings = self.settings(run, size)
        model = copy.deepcopy(self.start)
        if run.weights == "lora":
            model = add_adapters(model, LORA, LanguageModeling.lora_targets, run.seed)
        else:
            model.requires_grad_(True)
        validation = self.windows("validation", size, size.validation)
        served: Sequence[str] = [run.option]
        if size.everywhere:
            served = self.options
        elif run.method == "control" and run.weights == "full":
            served = {"main": self.options, "long": served}.get(run.size, (PLAIN, ALL))
        found: Windows = {}
        with attention_in(model, run.option, self.calibration(size)) as handle:
            attentions = {"original": handle.disabled, run.option: contextlib.nullcontext}
            if settings.compile:
                compile_blocks(handle, settings.compile)
            entry = fine_tune(
                model,
                settings,
                self.windows("train", size, None),
                teacher=self.teacher if settings.distillation else None,
                measure=lambda: means(self.measure(model, attentions, validation, size, settings)),
                attention=attentions["original" if settings.attention == "original" else run.option],
            )
            if settings.attention != "original":
                # As it was trained: keys are still shifted by the means of the starting model, as an export would have it.
                found = self.measure(model, attentions, self.windows("test", size, size.test), size, settings)
                served = [option for option in served if option != run.option]
        entry["test"] = found | self.test(model, served, size, settings)
        return entry | {"settings": dataclasses.asdict(run) | dataclasses.asdict(size) | _plain(settings)}

    def test(self, model: torch.nn.Module, options: Iterable[str], size: Size, settings: TrainingSettings) -> Windows:
        """Measure a model on test text, in original attention and in these options; keys are shifted by its own means."""
        windows, found = self.windows("test", size, size.test), {}
        for option in options:
            with attention_in(model, option, self.calibration(size)) as handle:
                attentions = {"original": handle.disabled, option: contextlib.nullcontext}
                found |= self.measure(model, attentions, windows, size, settings)
        return found

    def measure(
        self,
        model: torch.nn.Module,
        attentions: dict[str, Attention],
        windows: torch.Tensor,
        size: Size,
        settings: TrainingSettings,
    ) -> Windows:
        """`measure_windows`, without what training was compiled to."""
        with torch.compiler.set_stance("force_eager"):
            return measure_windows(model, attentions, windows, self.teacher, settings, size.at_once)

    def calibration(self, size: Size) -> list[dict[str, torch.Tensor]]:
        """Training text, for `k_shift`."""
        return [{"input_ids": ids[None]} for ids in self.windows("train", size, 8)]

    def windows(self, split: str, size: Size, count: int | None) -> torch.Tensor:
        return self.language.windows(split, size.length, count).to(self.device)

    def settings(self, run: Run, size: Size) -> TrainingSettings:
        """The paper's settings, except that a short run needs a schedule that ends at zero."""
        on_gpu = self.device.type == "cuda"
        return TrainingSettings(
            output_dir="",
            steps=size.steps,
            batch_size=size.batch,
            learning_rate=run.rate,
            schedule="cosine",
            warmup_steps=size.steps // 10,
            fused_optimizer=on_gpu,
            mixed_precision="bf16" if on_gpu else None,
            seed=run.seed,
            eval_every=size.steps // 4,
            compile=self.compiler,
            **METHODS[run.method],
        )


def _plain(settings: TrainingSettings) -> dict[str, Any]:
    """What of the settings decides about the numbers."""
    names = "learning_rate schedule warmup_steps betas weight_decay max_grad_norm mixed_precision attention distillation compile"
    return {name: getattr(settings, name) for name in names.split()}


def make_trainer(folder: Path, device: str) -> Callable[[Run | str], Entry]:
    """A trainer on a prepared folder."""
    return Trainer(Language(folder), device, SIZES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = command_line("trained", "trained.json", "experiment 2: training through 4-bit attention")
    parser.add_argument("--language", type=Path, default=LANGUAGE, help="what evidence.language prepared; default %(default)s")
    options = parser.parse_args(arguments)
    prepare = partial(make_trainer, options.language, options.device)
    results = Results(options.results)
    work_through(results, plan, prepare, device=options.device, workers=options.workers, seconds=options.seconds)


if __name__ == "__main__":
    main()
