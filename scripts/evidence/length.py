"""Experiment 7: training at length. What does a language model lose in FP4 after hundreds and thousands of steps?

python -m scripts.evidence.documents FOLDER   # of unpacked packages; see there
python -m scripts.evidence.length --workers 4 --within 450

As experiment 2 (trained.py), on 25 times as much text, of which no token is seen twice in 8,000 steps. A step has 4,096 tokens
in four windows, as in experiments 2 and 6, so that steps compare. That is half of the paper's, and a minute of a GPU has nearly
twice as many steps: what is learned about a grid is learned by updates. Every run is measured in original attention, in plain
NVFP4 and in NVFP4 with all options, on the first windows of 96 held-out documents.

Runs are short enough to be trained in one sitting: a model of this size cannot leave every machine, so that a run that is cut is
lost. `--within` starts none that would not end in time, going by how long the runs before took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from scripts.evidence.documents import FOLDER
from scripts.evidence.language import Language
from scripts.evidence.results import Entry, Results, command_line, work_through
from scripts.evidence.trained import ALL, PLAIN, RATES, SEEDS, Run, Size, Trainer, tried_rates

OPTIONS = (PLAIN, ALL)
"""What is trained through."""
Q_SHIFT = "definition+rotate+four_over_six+k_shift+q_shift"
"""ALL and a calibrated mean of Q. Every run is measured in it too."""
_MEASURED = {"test": 96, "validation": 16, "at_once": 16, "everywhere": True}
SIZES = {f"{steps}-steps": Size(steps=steps, **_MEASURED) for steps in (500, 2000, 8000)} | {"main": Size(**_MEASURED)}
SHORT, LONG, LONGEST = "500-steps", "2000-steps", "8000-steps"
ARMS = (("control", ALL), ("task", ALL), ("task", PLAIN), ("distill", ALL), ("distill", PLAIN), ("mix", ALL))
"""Methods, and what each trains through. Controls, which train through their own attention, have their curves in ALL."""
FIRST = ARMS[:4]
GUESS = {
    "full": {"distill": 1e-4, "mix": 3e-4, "task": 3e-4, "control": 3e-4},
    "lora": {"distill": 3e-3, "task": 3e-3, "control": 3e-3},
}
"""Learning rates to begin with: the best of experiment 2. Full fine-tuning through ALL tries neighbours; see `swept`."""


def rate_of(results: Mapping[str, Entry], method: str, option: str, size: str, weights: str = "full") -> float:
    """The best learning rate that was tried, by the method's own objective on validation text: at this length, else at the
    shortest, else through ALL; else the guess."""
    for where in ((option, size), (option, SHORT), (ALL, SHORT)):
        tried = tried_rates(results, method, weights, *where)
        if tried:
            return min(tried, key=lambda rate: tried[rate])
    return GUESS[weights][method]


def neighbours(results: Mapping[str, Entry], method: str) -> list[float]:
    """The best learning rate of the shortest runs through ALL, and those beside it."""
    at = RATES["full"].index(rate_of(results, method, ALL, SHORT))
    return list(RATES["full"][max(0, at - 1) : at + 2])


def swept(results: Mapping[str, Entry], method: str) -> bool:
    """Whether the neighbours of the best learning rate were tried and are worse, or the method has no sweep."""
    tried = tried_rates(results, method, "full", ALL, SHORT)
    return (method, ALL) not in FIRST or set(neighbours(results, method)) <= tried.keys()


def plan(results: Mapping[str, Entry]) -> Iterator[tuple[str, Run | str]]:
    """All runs that can be named so far, the most important first; the first of all measures the model as it is."""
    yield "untrained/main", "main"

    def arms(
        which: Iterable[tuple[str, str]], size: str, seeds: Iterable[int], weights: str = "full"
    ) -> Iterator[tuple[str, Run]]:
        for seed in seeds:
            for method, option in which:
                if weights == "full" and not swept(results, method):
                    continue
                rate = rate_of(results, method, option, size, weights)
                run = Run(method=method, weights=weights, option=option, size=size, rate=rate, seed=seed)
                yield run.key, run

    for method in (method for method, option in FIRST if option == ALL):
        first = Run(method=method, option=ALL, size=SHORT, rate=GUESS["full"][method], seed=SEEDS[0])
        yield first.key, first
    for method in (method for method, option in FIRST if option == ALL):
        for rate in neighbours(results, method):
            run = Run(method=method, option=ALL, size=SHORT, rate=rate, seed=SEEDS[0])
            yield run.key, run
    yield from arms(FIRST, SHORT, SEEDS)
    yield from arms(FIRST, LONG, SEEDS)
    yield from arms(FIRST, LONG, SEEDS[:1], "lora")
    yield from arms(ARMS[:2], LONGEST, SEEDS[:1])
    yield from arms(ARMS[4:], LONG, SEEDS)
    yield from arms(ARMS[4:], SHORT, SEEDS)
    yield from arms(FIRST, LONG, SEEDS, "lora")
    yield from arms(ARMS[:2], LONGEST, SEEDS)


def expected(results: Mapping[str, Entry], run: Run) -> float:
    """Seconds that a run takes: by the slowest so far of its method, weights and length, else of its method, else of all."""
    runs = [entry for entry in results.values() if "seed" in entry["settings"]]
    for alike in (("method", "weights", "size"), ("method",), ()):
        paces = [
            entry["seconds"] / entry["settings"]["steps"]
            for entry in runs
            if all(entry["settings"][name] == getattr(run, name) for name in alike)
        ]
        if paces:
            return SIZES[run.size].steps * max(paces)
    return 0.0


def fitting(results: Mapping[str, Entry], ends: float) -> Iterator[tuple[str, Run | str]]:
    """The runs of the plan that should end before `ends` (of time.monotonic)."""
    left = ends - time.monotonic()
    for key, unit in plan(results):
        if left > (0 if isinstance(unit, str) else expected(results, unit)):
            yield key, unit


def make_trainer(folder: Path, device: str, compiler: str | None) -> Callable[[Run | str], Entry]:
    """For `work_through`, which calls it in its workers."""
    return Trainer(Language(folder), device, SIZES, (*OPTIONS, Q_SHIFT), compiler)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing."""
    parser = command_line("length", "length.json", "experiment 7: training at length")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="what scripts.evidence.documents prepared; default %(default)s"
    )
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile, for training, such as inductor; default: none")
    parser.add_argument(
        "--within", type=float, help="start no run that should not end within so many seconds; default: start all"
    )
    options = parser.parse_args(arguments)
    units = plan if options.within is None else partial(fitting, ends=time.monotonic() + options.within)
    prepare = partial(make_trainer, options.folder, options.device, options.compile)
    work_through(
        Results(options.results), units, prepare, device=options.device, workers=options.workers, seconds=options.seconds
    )


if __name__ == "__main__":
    main()
