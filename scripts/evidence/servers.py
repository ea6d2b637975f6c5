"""Experiment 6: what models lose on the grids of servers, and what training through them wins back.

python -m scripts.evidence.language && python -m scripts.evidence.servers language --workers 4
python -m scripts.evidence.video clips && python -m scripts.evidence.video pretrain
python -m scripts.evidence.servers video --workers 4

As experiment 2 (trained.py, video_experiments.py), but longer, and through a preset of a server: a KV cache in NVFP4 for
SmolLM2-135M, SageAttention3 for the small Wan. Controls train equally long through original attention and are served through the
preset. Learning rates of the language model: the best of a sweep of this length, of each method; of the video model: those of
experiment 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scripts.arguments import new_parser
from scripts.evidence import trained, video_experiments
from scripts.evidence.language import FOLDER as LANGUAGE
from scripts.evidence.language import Language
from scripts.evidence.results import FOLDER as RESULTS
from scripts.evidence.results import Entry, Results, work_through
from scripts.evidence.video import FOLDER as VIDEO
from scripts.evidence.video import Size as VideoSize

STEPS = 1000
CACHE, SAGE = "preset=kv_nvfp4", "preset=sage3"
"""What is trained through."""
UNTRAINED = ("nvfp4", CACHE, "preset=kv_nvfp4_fp8", "preset=kv_nvfp4_4over6", "preset=fa4_fp4")
"""What the language model is measured in besides."""
VIDEO_UNTRAINED = ("original", "nvfp4", SAGE, "preset=fa4_fp4", "preset=fastvideo_sm120")
VIDEO_RATES = {"control": 1e-4, "task": 1e-4, "distill": 3e-5}
METHODS = ("distill", "control", "task")
SIZES = {"main": trained.Size(steps=STEPS)}


def plan_language(results: Mapping[str, Entry]) -> Iterator[tuple[str, trained.Run | str]]:
    """All runs that can be named so far, the most important first."""
    yield "untrained/main", "main"
    for method in METHODS:
        for rate in trained.next_rates(results, method, "full", CACHE):
            run = trained.Run(method=method, option=CACHE, rate=rate, seed=trained.SEEDS[0])
            yield run.key, run
    for seed in trained.SEEDS:
        for method in METHODS:
            rate = trained.best_rate(results, method, "full", CACHE)
            if rate is not None:
                run = trained.Run(method=method, option=CACHE, rate=rate, seed=seed)
                yield run.key, run


def plan_video(results: Mapping[str, Entry]) -> Iterator[tuple[str, video_experiments.Run | str]]:
    """All runs, the most important first."""
    yield from ((name, name) for name in VIDEO_UNTRAINED)
    for seed in video_experiments.SEEDS:
        for method in METHODS:
            run = video_experiments.Run(method=method, attention=SAGE, rate=VIDEO_RATES[method], seed=seed)
            yield run.key, run


def make_trainer(folder: Path, device: str) -> Callable[[trained.Run | str], Entry]:
    """For `work_through`, which calls it in its workers."""
    return trained.Trainer(Language(folder), device, SIZES, UNTRAINED)


def make_experiment(folder: Path, device: str) -> Callable[[str | video_experiments.Run], Entry]:
    """Likewise."""
    return video_experiments.Experiment(folder, VideoSize(), video_experiments.Extent(steps=STEPS), torch.device(device))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    kinds: dict[str, tuple[Any, Any, Path]] = {
        "language": (plan_language, make_trainer, LANGUAGE),
        "video": (plan_video, make_experiment, VIDEO),
    }
    parser = new_parser("scripts.evidence.servers", "experiment 6: training for the grids of servers")
    parser.add_argument("experiment", choices=kinds)
    parser.add_argument("--folder", type=Path, help="what scripts.evidence.language or .video prepared")
    parser.add_argument("--results", type=Path, help=f"JSON file; default servers_EXPERIMENT.json in {RESULTS}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side; default %(default)s")
    parser.add_argument("--seconds", type=float, help="start no more units after so long; default: finish all")
    options = parser.parse_args(arguments)
    plan, make, folder = kinds[options.experiment]
    results = Results(options.results or RESULTS / f"servers_{options.experiment}.json")
    prepare = partial(make, options.folder or folder, options.device)
    work_through(results, plan, prepare, device=options.device, workers=options.workers, seconds=options.seconds)


if __name__ == "__main__":
    main()
