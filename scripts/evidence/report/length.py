"""Tables and curves of experiment 7: training at length. Runs that are not there yet have a row that says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from scripts.evidence.estimates import Estimate, Matrix, difference, estimate, share
from scripts.evidence.length import ARMS, FIRST, LONG, LONGEST, OPTIONS, Q_SHIFT, SHORT, SIZES, rate_of
from scripts.evidence.report.tables_and_figures import devices_of, figure, in_words, measured_on, picture, table
from scripts.evidence.report.trained import column, describe
from scripts.evidence.trained import ALL, PLAIN, SEEDS, Run, tried_rates

Entries = Mapping[str, dict[str, Any]]
Results = Callable[[str], Entries]
CURVES = "length-gaps"
PLANNED = (
    *((SHORT, "full", *arm) for arm in ARMS),
    *((LONG, "full", *arm) for arm in ARMS),
    *((LONGEST, "full", *arm) for arm in ARMS[:2]),
    *((LONG, "lora", *arm) for arm in FIRST),
)
"""Size, weights, method, and what it trains through: a row each."""
_LOSS = ("loss, original attention", "plain: above its own", "plain: above the control", "of the untrained plain gap")
_LOSS += ("all three: above its own", "all three: above the control", "of the untrained plain gap")
_KL = ("loss, original attention", "plain: KL to the start", "of the untrained plain KL", "all three: KL to the start")
_KL += ("of the untrained plain KL", "all three: KL to its own original")


class Arm(NamedTuple):
    """The runs of a method at one length, at the best learning rate that was tried."""

    size: str
    weights: str
    method: str
    option: str

    @property
    def steps(self) -> int:
        return SIZES[self.size].steps

    def runs(self, entries: Entries) -> dict[int, dict[str, Any]]:
        """By seed."""
        rate = rate_of(entries, self.method, self.option, self.size, self.weights)
        keys = {seed: self._key(rate, seed) for seed in SEEDS}
        return {seed: entries[key] for seed, key in keys.items() if key in entries}

    def control(self) -> Arm:
        """What trained as long on the task loss in original attention."""
        return Arm(self.size, self.weights, *ARMS[0])

    def title(self) -> str:
        """In words, such as `task, all three`; a control trains through its own attention."""
        through = "" if self.method == "control" else f", {describe(self.option)}"
        return f"{self.method}{through}{', LoRA' if self.weights == 'lora' else ''}"

    def rate_and_key(self, entries: Entries) -> tuple[str, str]:
        """The learning rate and how many were tried, and where the runs are."""
        rate = rate_of(entries, self.method, self.option, self.size, self.weights)
        tried = len(tried_rates(entries, self.method, self.weights, self.option, self.size))
        seeds = ",".join(map(str, self.runs(entries)))
        return f"{rate:g} (of {tried})", f"`{self._key(rate, 0).replace('seed=0', f'seed={seeds}')}`"

    def _key(self, rate: float, seed: int) -> str:
        run = Run(method=self.method, weights=self.weights, option=self.option, size=self.size, rate=rate, seed=seed)
        return run.key


def above_its_own(tests: Iterable[dict[str, Any]], option: str) -> Estimate:
    """How far 4-bit attention is above the original attention of the same weights."""
    measured = column(tests)
    return estimate(difference(measured(f"loss_{option}"), measured("loss_original")))


def with_control(entries: Entries, arm: Arm) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs of an arm and the controls of equal steps, of the seeds that both have."""
    ours, theirs = arm.runs(entries), arm.control().runs(entries)
    seeds = sorted(ours.keys() & theirs.keys())
    return [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]


def above_control(entries: Entries, arm: Arm, option: str) -> Matrix:
    """How far an arm in 4-bit attention is above the original attention of its controls: a row a seed. Empty without them."""
    ours, theirs = with_control(entries, arm)
    return difference(column(ours)(f"loss_{option}"), column(theirs)("loss_original")) if ours else []


def measured_in(tests: Iterable[dict[str, Any]], option: str) -> bool:
    """Whether these runs were measured in an option: older ones were not in all of them."""
    return all(f"loss_{option}" in entry["test"] for entry in tests)


def untrained_gap(entries: Entries) -> list[float]:
    """What plain NVFP4 costs the model before training, by window."""
    before = column([entries["untrained/main"]])
    return list(difference(before(f"loss_{PLAIN}"), before("loss_original"))[0])


def _losses(results: Results) -> str:
    entries = results("length")

    def cells(arm: Arm) -> list[str]:
        runs = list(arm.runs(entries).values())
        found = [str(estimate(column(runs)("loss_original")))]
        for option in OPTIONS:
            gap = above_control(entries, arm, option)
            found.append(above_its_own(runs, option).signed())
            found += [estimate(gap).signed(), share(gap, untrained_gap(entries))] if gap else ["no control yet", ""]
        return found

    return _finish(results, _LOSS, cells, ("control", "task", "mix"), picture(CURVES, "What 4-bit attention costs over steps"))


def _with_q_shift(results: Results) -> str:
    """What a calibrated mean of Q adds to all three options, for each arm that was measured with it."""
    entries = results("length")
    start = [entry for key, entry in entries.items() if key == "untrained/main"]
    if not start or not measured_in(start, Q_SHIFT):
        return ""
    options, whole = (*OPTIONS, Q_SHIFT), untrained_gap(entries)
    rows = [["0", "untrained", "", *(str(above_its_own(start, option)) for option in options), "", "", ""]]
    for arm in map(Arm._make, PLANNED):
        runs = list(arm.runs(entries).values())
        if not runs or not measured_in(runs, Q_SHIFT):
            continue
        cells = [f"{arm.steps:,}", arm.title(), str(len(runs)), *(str(above_its_own(runs, option)) for option in options)]
        gaps = [above_control(entries, arm, option) for option in options[1:]]
        rows.append(
            [*cells, *(str(estimate(gap)) if gap else "no control yet" for gap in gaps), share(gaps[1], whole) if gaps[1] else ""]
        )
    served = ("all three", "all three and a mean of Q")
    head = ["steps", "trained", "seeds", *(f"{what}: above its own" for what in ("plain", *served))]
    return table([*head, *(f"{what}: above the control" for what in served), "of the untrained plain gap"], rows)


def _divergences(results: Results) -> str:
    entries = results("length")

    def cells(arm: Arm) -> list[str]:
        measured = column(arm.runs(entries).values())
        start = column([entries["untrained/main"]])(f"kl_{PLAIN}")[0]
        found = [str(estimate(measured("loss_original")))]
        for option in OPTIONS:
            kl = measured(f"kl_{option}")
            found += [str(estimate(kl)), share(kl, start)]
        return [*found, str(estimate(measured(f"between_{ALL}")))]

    return _finish(results, _KL, cells, ("distill",))


def _finish(
    results: Results, head: tuple[str, ...], cells: Callable[[Arm], list[str]], methods: tuple[str, ...], shown: str = ""
) -> str:
    """A row for each planned arm of these methods, below the starting model."""
    entries = results("length")
    if "untrained/main" not in entries:
        return ""
    before = _untrained_cells(entries["untrained/main"], head)
    rows = [["0", "untrained", "", "", *before, "`untrained/main`"]]
    for arm in (arm for arm in map(Arm._make, PLANNED) if arm.method in methods):
        seeds = len(arm.runs(entries))
        if seeds:
            rate, key = arm.rate_and_key(entries)
            rows.append([f"{arm.steps:,}", arm.title(), rate, str(seeds), *cells(arm), key])
        else:
            rows.append([f"{arm.steps:,}", arm.title(), "", "not run", *[""] * len(head), ""])
    text = table(("steps", "trained", "learning rate", "seeds", *head, "keys"), rows)
    return f"{text}\n\n{measured_on(entries.values())} Keys are those of length.json.{shown}"


def _untrained_cells(entry: dict[str, Any], head: tuple[str, ...]) -> list[str]:
    measured = column([entry])
    found = [str(estimate(measured("loss_original")))]
    if head == _LOSS:
        gaps = {option: difference(measured(f"loss_{option}"), measured("loss_original")) for option in OPTIONS}
        for option in OPTIONS:
            found += [estimate(gaps[option]).signed(), "", share(gaps[option], gaps[PLAIN][0])]
        return found
    for option in OPTIONS:
        found += [str(estimate(measured(f"kl_{option}"))), share(measured(f"kl_{option}"), measured(f"kl_{PLAIN}")[0])]
    return [*found, ""]


def _curves(results: Results, file: Path) -> None:
    """Gaps over steps, each arm served in the option that it trained through, and controls in both."""
    entries = results("length")
    if "untrained/main" not in entries:
        return
    sizes = (SHORT, LONG, LONGEST)
    places = [0, *(SIZES[size].steps for size in sizes)]
    caption = f"SmolLM2-135M on documentation, 96 held-out documents, with standard errors; {devices_of(entries.values())}"
    with figure(file, 2, caption=caption, width=6.0) as (own, control):
        for color, method in enumerate(("control", "task", "distill")):
            for option, style in zip(OPTIONS, ("o--", "o-"), strict=True):
                through = ALL if method == "control" else option
                arms = [Arm(size, "full", method, through) for size in sizes]
                if not any(arm.runs(entries) for arm in arms):
                    continue
                start = above_its_own([entries["untrained/main"]], option)
                owns = [above_its_own(runs, option) if (runs := list(arm.runs(entries).values())) else None for arm in arms]
                gaps = [estimate(gap) if (gap := above_control(entries, arm, option)) else None for arm in arms]
                for axes, points in ((own, owns), (control, gaps if method != "distill" else [])):
                    found = [(i, point) for i, point in enumerate([start, *points]) if point is not None]
                    if len(found) > 1:
                        axes.errorbar(
                            [i for i, _ in found],
                            [point.mean for _, point in found],
                            yerr=[point.error for _, point in found],
                            fmt=style,
                            color=f"C{color}",
                            capsize=2,
                            label=f"{in_words(method)}, served {'plain' if option == PLAIN else 'with all three options'}",
                        )
        for axes, title in (
            (own, "above its own original attention"),
            (control, "above the original attention of the control of equal steps"),
        ):
            axes.set_title(f"loss in 4 bits, {title}", fontsize=9)
            axes.set(xlabel="steps of 4,096 tokens", ylabel="nats per token")
            axes.set_xticks(range(len(places)), [f"{steps:,}" for steps in places])
            axes.set_ylim(bottom=0)


TABLES = {"length-losses": _losses, "length-q-shift": _with_q_shift, "length-distillation": _divergences}
FIGURES = {CURVES: _curves}
