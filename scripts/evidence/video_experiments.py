"""Experiments 1, 2 and 5 on video: what 4-bit attention costs a Wan transformer, what training wins back, and what moves.

python -m scripts.evidence.video clips && python -m scripts.evidence.video pretrain
python -m scripts.evidence.video_experiments untrained
python -m scripts.evidence.video_experiments trained --workers 4 --seconds 300

`untrained` measures the starting model in one attention after the other; `trained` fine-tunes it equally long by the methods of
METHODS, on the same samples in the same order (by seed), and measures the end. Learning rates: for each method the best of a grid
of half decades for what it minimizes, on validation windows, with seed 0, until both neighbours are worse.

An entry holds, for every held-out item (a window at a timestep) `loss`, the squared error of the velocity, and `velocity_error`,
its squared distance to the starting model's in original attention; for every sample (a caption and noise) `psnr` and `ssim` to
what the starting model makes of that noise in original attention, and `motion`, in which samples and real clips can be compared.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from qat_patch.measure.videos import motion, psnr, ssim
from scripts.arguments import new_parser
from scripts.demo_wan import denoise
from scripts.evidence.attention.by_name import attention_in
from scripts.evidence.results import FOLDER as RESULTS
from scripts.evidence.results import Entry, Results, work_through
from scripts.evidence.video import FOLDER, OBJECTIVE, SPLITS, Clips, Size, autocast, fit, load_start, settings

ALL = "nvfp4+rotate+k_shift+four_over_six"
UNTRAINED = (
    "original",
    "nvfp4",
    "sage3",
    "pv_bf16",
    "public_serving",
    "public_training",
    ALL,
    "nvfp4+rotate",
    "nvfp4+k_shift",
    "nvfp4+four_over_six",
    "nvfp4+rotate+k_shift",
    "nvfp4+rotate+four_over_six",
    "nvfp4+k_shift+four_over_six",
    "single_level",
    "v_along_head_dim",
    "p_only",
    "v_only",
    "pv_bf16+rotate+k_shift+four_over_six",
)
METHODS: dict[str, dict[str, Any]] = {
    "control": {"attention": "original"},
    "task": {},
    "distill": {"distillation": 1.0},
    "mix": {"distillation": 0.5},
    "control_mix": {"attention": "original", "distillation": 0.5},
}
"""As settings of the recipe: which attention a run trains through, and how much it follows the starting model."""
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
FIRST_RATES = (3e-5, 1e-4)
SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extent:
    """How long runs are, and how much is measured."""

    steps: int = 400
    batch: int = 4
    timesteps: int = 16
    """Of each held-out window."""
    noises: int = 4
    """Samples of each caption."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training."""

    method: str
    attention: str = "nvfp4"
    """What it is served in, and trains through unless it is a control."""
    rate: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.method}/{self.attention}/rate={self.rate:g}/seed={self.seed}"


def plan_untrained(results: Mapping[str, Entry]) -> Iterator[tuple[str, str]]:
    """The clips themselves, for their motion, and every attention."""
    yield from ((name, name) for name in ("clips", *UNTRAINED))


def plan_trained(results: Mapping[str, Entry]) -> Iterator[tuple[str, Run]]:
    """All runs that can be named so far, the most important first."""
    for methods in (("distill", "task", "control"), ("mix", "control_mix")):
        for method in methods:
            for rate in next_rates(tried_rates(results, method)):
                run = Run(method=method, rate=rate, seed=SEEDS[0])
                yield run.key, run
        yield from _seeds(results, methods, "nvfp4")
    yield from _seeds(results, ("distill", "task", "control"), ALL)


def _seeds(results: Mapping[str, Entry], methods: Sequence[str], attention: str) -> Iterator[tuple[str, Run]]:
    for seed in SEEDS:
        for method in methods:
            rate = best_rate(results, method)
            if rate is not None:
                run = Run(method=method, attention=attention, rate=rate, seed=seed)
                yield run.key, run


def tried_rates(results: Mapping[str, Entry], method: str) -> dict[float, float]:
    """What the runs of a method's sweep reached on validation windows, by learning rate; diverged: infinite."""
    found = {}
    for rate in RATES:
        entry = results.get(Run(method=method, rate=rate, seed=SEEDS[0]).key)
        if entry is not None:
            value = _objective(method, entry["validation"])
            found[rate] = value if math.isfinite(value) else math.inf
    return found


def _objective(method: str, measured: dict[str, list[float]]) -> float:
    distillation = METHODS[method].get("distillation", 0.0)
    return (1 - distillation) * mean(measured["loss"]) + distillation * mean(measured["velocity_error"])


def next_rates(tried: Mapping[float, float]) -> list[float]:
    """Learning rates of a sweep: those of its start, then the neighbours of the best."""
    if not set(FIRST_RATES) <= tried.keys():
        return list(FIRST_RATES)
    index = RATES.index(min(tried, key=tried.get))
    return sorted({*tried, *RATES[max(0, index - 1) : index + 2]})


def best_rate(results: Mapping[str, Entry], method: str) -> float | None:
    """The best learning rate, or None as long as the sweep goes on."""
    tried = tried_rates(results, method)
    done = tried and set(next_rates(tried)) == tried.keys()
    return min(tried, key=tried.get) if done else None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Experiment:
    """Measures and trains from one starting model again and again; what `work_through` calls in each worker."""

    def __init__(self, folder: Path, size: Size, extent: Extent, device: torch.device) -> None:
        self.extent, self.device = extent, device
        self.clips = Clips(folder, size, device)
        self.start = load_start(folder, device).requires_grad_(False)
        self.held_out = {split: self.clips.held_out(split, extent.timesteps, 16) for split in SPLITS[1:]}
        # Noise from the CPU: the same on every machine.
        noises = [torch.randn(size.latents, generator=torch.Generator().manual_seed(seed)) for seed in range(extent.noises)]
        self.noise = torch.stack(noises).repeat(len(self.clips.captions), 1, 1, 1, 1).to(device)
        self.text = self.clips.captions.repeat_interleave(extent.noises, 0)
        with torch.no_grad(), autocast(device):
            inputs = {split: map(OBJECTIVE.inputs, batches) for split, batches in self.held_out.items()}
            self.velocities = {split: [OBJECTIVE.outputs(self.start, x) for x in each] for split, each in inputs.items()}
        self.samples = self.sample(self.start)

    def __call__(self, unit: str | Run) -> Entry:
        if isinstance(unit, Run):
            return self.train(unit)
        return self.real_motion() if unit == "clips" else self.untrained(unit)

    def real_motion(self) -> Entry:
        """`motion` of the clips by split: of each clip the mean over its windows."""
        found: dict[str, list[float]] = {split: [] for split in SPLITS}
        for split, values in found.items():
            windows = self.clips.windows(split)
            for number in range(len(self.clips.frames)):
                videos = [self.clips.pixels(window) / 255 for window in windows if window[0] == number]
                values.append(mean(motion(torch.stack(videos))))
        return {"motion": {split: _rounded(values) for split, values in found.items()}}

    def untrained(self, attention: str) -> Entry:
        """The starting model in an attention."""
        with self.attention(self.start, attention):
            return {"test": self.measure(self.start), "settings": dataclasses.asdict(self.extent)}

    def train(self, run: Run) -> Entry:
        """Train, and measure the end in the attention that the run trains through; of controls in that of 4 bits too."""
        extent = self.extent
        chosen = settings(
            self.device,
            steps=extent.steps,
            batch_size=extent.batch,
            learning_rate=run.rate,
            seed=run.seed,
            **METHODS[run.method],
        )
        model = copy.deepcopy(self.start).requires_grad_(True)
        trained_in = "original" if chosen.attention == "original" else run.attention
        with self.attention(model, trained_in):
            # Not the batches of the pretraining.
            batches = self.clips.batches(1000 + run.seed, extent.steps, extent.batch)
            entry: Entry = fit(model, chosen, batches, teacher=self.teacher if chosen.distillation else None)
            entry["validation"] = self.predictions(model, "validation")
            entry["test"] = {trained_in: self.measure(model)}
        if run.attention != trained_in:
            with self.attention(model, run.attention):
                entry["test"][run.attention] = self.measure(model)
        return entry | {"settings": dataclasses.asdict(run) | dataclasses.asdict(extent)}

    def teacher(self, model: torch.nn.Module, inputs: Any) -> torch.Tensor:
        """The starting model in original attention."""
        with torch.no_grad():
            return OBJECTIVE.outputs(self.start, inputs)

    def attention(self, model: torch.nn.Module, name: str) -> Any:
        """An attention in force; keys are shifted by their means over samples to train on."""
        batches = self.clips.batches(999, 4, 4)
        return attention_in(model, name, [OBJECTIVE.inputs(batch).arguments for batch in batches] if "k_shift" in name else ())

    def measure(self, model: torch.nn.Module) -> dict[str, list[float]]:
        """Everything about a model as it is now, on test windows and samples."""
        found, videos = self.predictions(model, "test"), self.sample(model)
        pairs = [(ours.numpy(), theirs.numpy()) for ours, theirs in zip(videos, self.samples, strict=True)]
        found |= {"psnr": [psnr(*pair) for pair in pairs], "ssim": [ssim(*pair) for pair in pairs], "motion": motion(videos)}
        return {name: _rounded(values) for name, values in found.items()}

    @torch.no_grad()
    def predictions(self, model: torch.nn.Module, split: str) -> dict[str, list[float]]:
        """`loss` and `velocity_error` of each held-out item of a split."""
        found: dict[str, list[float]] = {"loss": [], "velocity_error": []}
        for batch, reference in zip(self.held_out[split], self.velocities[split], strict=True):
            inputs = OBJECTIVE.inputs(batch)
            with autocast(self.device):
                velocity = OBJECTIVE.outputs(model, inputs)
            for name, target in (("loss", inputs.velocity), ("velocity_error", reference)):
                found[name] += (velocity - target).square().mean((1, 2, 3, 4)).tolist()
        return {name: _rounded(values) for name, values in found.items()}

    def sample(self, model: torch.nn.Module) -> torch.Tensor:
        """Videos of every caption from every noise, on the CPU."""
        with autocast(self.device):
            return denoise(model, self.noise, self.text).float().cpu()


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def make_experiment(folder: Path, size: Size, extent: Extent, device: str) -> Callable[[str | Run], Entry]:
    """For `work_through`, which calls it in its workers."""
    return Experiment(folder, size, extent, torch.device(device))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    plans = {"untrained": plan_untrained, "trained": plan_trained}
    parser = new_parser("scripts.evidence.video_experiments", "experiments 1, 2 and 5 on video")
    parser.add_argument("experiment", choices=plans)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="what scripts.evidence.video prepared; default %(default)s")
    parser.add_argument("--results", type=Path, help=f"JSON file; default video_EXPERIMENT.json in {RESULTS}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side; default %(default)s")
    parser.add_argument("--seconds", type=float, help="start no more units after so long; default: finish all")
    options = parser.parse_args(arguments)
    results = Results(options.results or RESULTS / f"video_{options.experiment}.json")
    prepare = functools.partial(make_experiment, options.folder, Size(), Extent(), options.device)
    plan = plans[options.experiment]
    work_through(results, plan, prepare, device=options.device, workers=options.workers, seconds=options.seconds)


if __name__ == "__main__":
    main()
