"""A short table for each experiment, for docs/EVIDENCE.md, and what the advice is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from scripts.evidence import length, trained
from scripts.evidence.ablations import ARMS, LENGTHS
from scripts.evidence.estimates import Estimate, Matrix, difference, estimate, share
from scripts.evidence.report import ablations as report_ablations
from scripts.evidence.report import length as report_length
from scripts.evidence.report import servers as report_servers
from scripts.evidence.report import video as report_video
from scripts.evidence.report.tables_and_figures import in_words, table
from scripts.evidence.report.trained import column, describe, runs
from scripts.evidence.servers import CACHE, SAGE
from scripts.evidence.trained import ALL, PLAIN
from scripts.evidence.untrained import ATTENTIONS

Entries = Mapping[str, dict[str, Any]]
Results = Callable[[str], Entries]


def runs_of(entries: Entries, method: str, **options: Any) -> list[dict[str, Any]]:
    """The runs of a method of experiment 2, or the starting model."""
    return [entries["untrained/main"]] if method == "untrained" else [*runs(entries, method, **options).values()]


def original_loss(entries: Entries, method: str, **options: Any) -> Matrix:
    return column(runs_of(entries, method, **options))("loss_original")


def above_its_own(entries: Entries, method: str, served: str, **options: Any) -> Estimate:
    return report_length.above_its_own(runs_of(entries, method, **options), served)


def kl_of(entries: Entries, method: str, served: str, **options: Any) -> Matrix:
    return column(runs_of(entries, method, **options))(f"kl_{served}")


def paired(entries: Entries, method: str, option: str, size: str, weights: str = "full") -> tuple[Any, Any]:
    """The runs through an option and the controls of equal length, of the seeds that both have."""
    ours = runs(entries, method, option=option, size=size, weights=weights)
    theirs = runs(entries, "control", size=size, weights=weights)
    seeds = sorted(ours.keys() & theirs.keys())
    return column([ours[seed] for seed in seeds]), column([theirs[seed] for seed in seeds])


def against_control(entries: Entries, option: str, size: str = "main") -> Matrix:
    """The loss in 4 bits of the task trained through an option, less that of the control served in the same option."""
    ours, theirs = paired(entries, "task", option, size)
    return difference(ours(f"loss_{option}"), theirs(f"loss_{option}"))


def cost_of_the_cache(results: Results, method: str) -> Estimate:
    return report_servers.cost_of_the_cache(report_servers.tests_of_the_cache(results)[method])


def psnr_of(results: Results, method: str) -> Estimate:
    """Of samples of the small Wan through SageAttention3's preset, against those of its original attention."""
    entries = results("servers_video")
    trained = [entry["test"][SAGE] for entry in entries.values() if entry["settings"].get("method") == method]
    return estimate([test["psnr"] for test in trained or [entries[SAGE]["test"]]])


def needs(*files: str) -> Callable[[Callable[[Results], str]], Callable[[Results], str]]:
    """A table that is empty as long as one of these files of results is not there."""

    def decorate(make: Callable[[Results], str]) -> Callable[[Results], str]:
        return lambda results: make(results) if all(results(file) for file in files) else ""

    return decorate


_WITH_Q_SHIFT = "all three and a calibrated mean of Q"


def _options(option: str) -> str:
    return _WITH_Q_SHIFT if option == length.Q_SHIFT else describe(option)


def _served(option: str) -> str:
    return "served plain" if option == PLAIN else f"served with {_options(option)}"


@needs("untrained_language")
def _untrained(results: Results) -> str:
    entries = results("untrained_language")
    names = ("nvfp4", "nvfp4+rotate", "nvfp4+four_over_six", "nvfp4+k_shift", "nvfp4+rotate+four_over_six+k_shift")
    names += ("definition+q_shift", length.Q_SHIFT, "p_only", "v_only", "sage3")
    titles = {"nvfp4": "plain NVFP4", length.Q_SHIFT: f"{_WITH_Q_SHIFT}, eager baseline"}
    titles["definition+q_shift"] = f"{ATTENTIONS['definition+q_shift'].removeprefix('with ')}, eager baseline"
    rows = []
    for name in names:
        extra = estimate(difference([entries[name]["loss"]], [entries["original"]["loss"]]))
        title = titles.get(name, ATTENTIONS[name].removeprefix("with "))
        rows.append((title, str(extra), str(estimate([entries[name]["kl"]]))))
    return table(("", "extra loss", "KL to the original logits"), rows)


@needs("trained")
def _distillation(results: Results) -> str:
    entries = results("trained")
    start = column([entries["untrained/main"]])(f"kl_{PLAIN}")[0]
    arms = {"untrained, plain": ("untrained", PLAIN, {}), "untrained, all three": ("untrained", ALL, {})}
    arms |= {f"distilled through {describe(option)}": ("distill", option, {"option": option}) for option in (PLAIN, ALL)}
    arms["the same, LoRA of rank 16"] = ("distill", ALL, {"option": ALL, "weights": "lora"})
    for size in trained.OTHER_STEPS:
        steps = trained.SIZES[size].steps
        arms[f"distilled through all three, {steps} steps"] = ("distill", ALL, {"option": ALL, "size": size})
    rows = []
    for title, (method, option, options) in arms.items():
        kl = kl_of(entries, method, option, **options)
        rows.append((title, str(len(kl)) if options else "", str(estimate(kl)), share(kl, start)))
    return table(("", "seeds", "KL to the original model", "of the untrained plain KL"), rows)


@needs("trained")
def _task(results: Results) -> str:
    entries, rows = results("trained"), []
    for size in ("main", "longer"):
        steps = "" if size == "main" else f", {trained.SIZES[size].steps} steps"
        for option in (PLAIN, ALL):
            arms = {f"untrained, {describe(option)}": ("untrained", {})} if size == "main" else {}
            arms |= {f"control, {_served(option)}{steps}": ("control", {"size": size})}
            arms |= {f"trained through {describe(option)}{steps}": ("task", {"size": size, "option": option})}
            for title, (method, options) in arms.items():
                measured = column(runs_of(entries, method, **options))
                original, fp4 = measured("loss_original"), measured(f"loss_{option}")
                against = estimate(against_control(entries, option, size)).signed() if method == "task" else ""
                cells = [str(estimate(original)), str(estimate(fp4)), str(estimate(difference(fp4, original)))]
                rows.append((title, str(len(fp4)) if method != "untrained" else "", *cells, against))
    return table(("", "seeds", "loss, original", "loss, 4 bits", "above its own", "4 bits, against the control"), rows)


def _servers(results: Results) -> str:
    rows = []
    for name, tests in report_servers.tests_of_the_cache(results).items():
        kls = [str(estimate([test[f"{measure}_{CACHE}"] for test in tests])) for measure in ("between", "kl")]
        rows.append((report_servers.IN_WORDS[name], str(report_servers.cost_of_the_cache(tests)), *kls))
    head = ("served through `kv_nvfp4`", "above its own", "KL to its own original attention", "KL to the starting model")
    return table(head, rows)


def video_rows(results: Results) -> list[tuple[str, report_video.Row]]:
    """Untrained and distilled, plain and with all three options."""
    untrained = report_video.untrained_rows(results("video_untrained"))
    after = report_video.trained_rows(results("video_untrained"), results("video_trained"))
    distilled = {
        option: row
        for name, row in after.items()
        for option in (PLAIN, ALL)
        if name.startswith("distill") and f"`{option}`" in name
    }
    rows = [(f"untrained, {describe(option)}", untrained[option]) for option in (PLAIN, ALL)]
    return rows + [(f"distilled through {describe(option)}", distilled[option]) for option in (PLAIN, ALL)]


@needs("video_untrained", "video_trained")
def _video(results: Results) -> str:
    names = {"velocity error, 10⁻³": 2, "PSNR, dB": 1}
    rows = [
        (title, *(f"{row[name].mean:.{digits}f} ± {row[name].error:.{digits}f}" for name, digits in names.items()))
        for title, row in video_rows(results)
    ]
    return table(("", *names), rows)


def _length(results: Results) -> str:
    """The task loss, as it was trained and controls in both options; what was not run has no row."""
    entries = results("length")
    if "untrained/main" not in entries:
        return ""
    start, whole = [entries["untrained/main"]], report_length.untrained_gap(entries)
    options = (*length.OPTIONS, length.Q_SHIFT)
    rows = [
        ("0", f"untrained, {_options(option)}", "", str(report_length.above_its_own(start, option)), "", "")
        for option in options
        if report_length.measured_in(start, option)
    ]
    for size in (length.SHORT, length.LONG, length.LONGEST):
        for method in ("control", "task"):
            for option in options:
                arm = report_length.Arm(size, "full", method, PLAIN if (method, option) == ("task", PLAIN) else ALL)
                found = [*arm.runs(entries).values()]
                if not found or not report_length.measured_in(found, option):
                    continue
                own, gap = report_length.above_its_own(found, option), report_length.above_control(entries, arm, option)
                title = f"control, {_served(option)}" if method == "control" else f"trained through {describe(arm.option)}"
                if method == "task" and option != arm.option:
                    title += f", {_served(option)}"
                gaps = (str(estimate(gap)), share(gap, whole)) if gap else ("no control", "")
                rows.append((f"{arm.steps:,}", title, str(len(found)), str(own), *gaps))
    head = ("steps", "trained", "seeds", "above its own original attention", "above that of the control of equal steps")
    return table((*head, "of the untrained plain gap"), rows)


@needs("ablations")
def _backward(results: Results) -> str:
    entries, rows = results("ablations"), []
    for tokens in sorted(LENGTHS):
        units = report_ablations.gradients(entries, tokens)
        error = estimate([[unit["whole"]["public_training"]["relative_l2"]] for unit in units]).mean
        rows.append((f"{tokens:,}", f"{error:.3f}"))
    gradients = table(("tokens", "error of the public backward, all parameters"), rows)
    ours, rows = report_ablations.runs(entries, "definition", "512", 0.0), []
    for arm in (arm for arm in ARMS if arm != "definition"):
        found = {seed: entry for seed, entry in report_ablations.runs(entries, arm, "512", 0.0).items() if seed in ours}
        if not found:
            continue
        losses = [report_ablations.served(entry) for entry in found.values()]
        loss = estimate(difference(losses, [report_ablations.served(ours[seed]) for seed in found]))
        rows.append((in_words(arm), str(len(found)), loss.signed()))
    return f"{gradients}\n\n{table(('trained with, 512 tokens', 'seeds', 'loss as served, against this package'), rows)}"


TABLES = {
    "summary-untrained": _untrained,
    "summary-distillation": _distillation,
    "summary-task": _task,
    "summary-servers": _servers,
    "summary-video": _video,
    "summary-length": _length,
    "summary-backward": _backward,
}
FIGURES: dict[str, Any] = {}
