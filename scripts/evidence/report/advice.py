"""What follows from all experiments, for README.md and docs/EVIDENCE.md: the advice, the targets, and what quality to expect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scripts.evidence import length, trained
from scripts.evidence.estimates import Estimate, difference, estimate, ratio
from scripts.evidence.report import length as report_length
from scripts.evidence.report.summary import (
    Entries,
    Results,
    above_its_own,
    against_control,
    cost_of_the_cache,
    kl_of,
    needs,
    original_loss,
    paired,
    psnr_of,
    video_rows,
)
from scripts.evidence.report.tables_and_figures import devices_of, table
from scripts.evidence.report.trained import column
from scripts.evidence.servers import STEPS
from scripts.evidence.trained import ALL, PLAIN

COUNTS = {1: "one seed", 2: "two seeds", 3: "three seeds"}
SECTIONS = {
    "untrained": "1-the-options-untrained",
    "distillation": "2-distillation",
    "task": "3-the-task-loss",
    "servers": "4-servers",
    "video": "5-video",
    "length": "6-at-length",
}
"""Of docs/EVIDENCE.md."""


def _arrow(before: Estimate, after: Estimate, digits: int = 3) -> str:
    return f"{before.mean:.{digits}f} → {after.mean:.{digits}f}"


@needs("trained", "servers_language", "servers_video", "video_untrained", "video_trained")
def _advice(results: Results) -> str:
    return _advice_table(results, "")


@needs("trained", "servers_language", "servers_video", "video_untrained", "video_trained")
def _advice_first(results: Results) -> str:
    """For README.md."""
    return _advice_table(results, "docs/EVIDENCE.md")


def _advice_table(results: Results, document: str) -> str:
    head = ("you have", "you serve on", "do this", "it costs", "it brings", "from")
    numbers = {section: number for number, section in enumerate(SECTIONS, 1)}
    rows = [(*cells, f"[{numbers[section]}]({document}#{SECTIONS[section]})") for *cells, section in _advice_rows(results)]
    return table(head, rows)


def _advice_rows(results: Results) -> list[Sequence[str]]:
    """What stands under the head of the table; last the section that it follows from."""
    entries = results("trained")
    untrained = {option: estimate(kl_of(entries, "untrained", option)) for option in (PLAIN, ALL)}
    gaps = {option: above_its_own(entries, "untrained", option) for option in (PLAIN, ALL)}
    control = {option: above_its_own(entries, "control", option) for option in (PLAIN, ALL)}
    distilled = estimate(kl_of(entries, "distill", ALL, option=ALL))
    adapters = estimate(kl_of(entries, "distill", ALL, option=ALL, weights="lora"))
    against = {option: estimate(against_control(entries, option)) for option in (PLAIN, ALL)}
    original = estimate(difference(original_loss(entries, "task", option=PLAIN), original_loss(entries, "control")))
    cache = {name: cost_of_the_cache(results, name).mean for name in ("control", "task", "distill")}
    in_float32 = [estimate([results("untrained_language")[name]["kl"]]) for name in ("nvfp4", length.Q_SHIFT)]
    ours, steps = "this package's kernels", f"{trained.SIZES['main'].steps}"
    return [
        (
            "no data to train on",
            ours,
            "use the three options and `q_shift`, which `calibrate` measures",
            "calibration on a few batches",
            f"KL {_arrow(untrained[PLAIN], untrained[ALL])}, loss above its own {_arrow(gaps[PLAIN], gaps[ALL])}; "
            f"with `q_shift` too, in another implementation, KL {_arrow(*in_float32)}",
            "untrained",
        ),
        (
            "text, and the model should stay what it is",
            ours,
            "distil through the three options; LoRA is enough",
            f"{steps} steps of 4,096 tokens",
            f"KL {_arrow(untrained[ALL], distilled)}; LoRA {adapters.mean:.3f}",
            "distillation",
        ),
        (
            "a task, up to 360 steps",
            ours,
            "fine-tune as you do, serve with the three options",
            "nothing more",
            f"loss above its own {_arrow(control[PLAIN], control[ALL])}; training through them changes the loss in 4 bits by "
            f"{against[ALL].mean:+.3f} ± {against[ALL].error:.3f}",
            "task",
        ),
        (
            "a task, up to 360 steps",
            "a kernel for plain NVFP4",
            "train through plain NVFP4",
            f"{original.mean:.3f} nats in original attention",
            f"{-against[PLAIN].mean:.3f} ± {against[PLAIN].error:.3f} lower loss in 4 bits than the control",
            "task",
        ),
        (
            f"a task or text, {STEPS:,} steps",
            "a server with an NVFP4 KV cache",
            "train or distil through the preset `kv_nvfp4`",
            "the time of training",
            f"loss above its own: {cache['task']:.3f} (task), {cache['distill']:.3f} (distilled); control {cache['control']:.3f}",
            "servers",
        ),
        (
            "clips, a video model that should stay what it is",
            ours,
            "distil through the three options",
            "400 steps",
            f"PSNR {_arrow(*(row[1]['PSNR, dB'] for row in video_rows(results)[1::2]), digits=1)} dB",
            "video",
        ),
        (
            "the same",
            "SageAttention3",
            "distil through the preset `sage3`",
            f"{STEPS:,} steps",
            f"PSNR {_arrow(psnr_of(results, 'untrained'), psnr_of(results, 'distill'), digits=1)} dB",
            "servers",
        ),
        *advice_at_length(results("length")),
    ]


def advice_at_length(entries: Entries) -> list[Sequence[str]]:
    """Of the shortest runs, if there are any, and of the longest length that control and task loss were both run at."""
    short = _advice_of(entries, (length.SHORT,), f"a task, {length.SIZES[length.SHORT].steps} steps")
    have = "a task, thousands of steps"
    long = _advice_of(entries, (length.LONGEST, length.LONG), have) or [(have, "any", "not known yet", "", "", "length")]
    return short + long


def _advice_of(entries: Entries, sizes: Sequence[str], have: str) -> list[Sequence[str]]:
    """Train through 4-bit attention if that wins by two standard errors, at the first of these lengths that has both runs."""
    for size in sizes:
        arm = report_length.Arm(size, "full", "task", ALL)
        ours, theirs = report_length.with_control(entries, arm)
        if not ours:
            continue
        gain = estimate(difference(column(ours)(f"loss_{ALL}"), column(theirs)(f"loss_{ALL}")))
        control = report_length.above_its_own(theirs, ALL)
        task = estimate(report_length.above_control(entries, arm, ALL))
        original = estimate(difference(column(ours)("loss_original"), column(theirs)("loss_original")))
        wins = gain.mean < -2 * gain.error
        return [
            (
                have,
                "this package's kernels",
                "train through the three options" if wins else "fine-tune as you do, serve with the three options",
                f"{original.mean:.3f} nats in original attention" if wins else "nothing more",
                f"above the original attention of the control: {_arrow(control, task)} by training through 4 bits "
                f"({arm.steps:,} steps, {COUNTS[len(ours)]}; difference {gain.mean:+.3f} ± {gain.error:.3f})",
                "length",
            )
        ]
    return []


@needs("trained")
def _targets(results: Results) -> str:
    """The best that was measured of each target, in short runs and in long ones."""
    entries = results("trained")
    start = column([entries["untrained/main"]])
    gap, kl = difference(start(f"loss_{PLAIN}"), start("loss_original"))[0], start(f"kl_{PLAIN}")[0]

    def of_task(size: str) -> tuple[Estimate, str]:
        ours, theirs = paired(entries, "task", ALL, size)
        return ratio(difference(ours(f"loss_{ALL}"), theirs("loss_original")), gap), _extent(size, len(theirs("loss_original")))

    def of_distillation(size: str) -> tuple[Estimate, str]:
        ours = kl_of(entries, "distill", ALL, option=ALL, size=size)
        return ratio(ours, kl), _extent(size, len(ours))

    found = {
        "task": [of_task("main"), of_task("longer"), *long_targets(results("length"), "task")],
        "distill": [of_distillation("main"), of_distillation("longer"), *long_targets(results("length"), "distill")],
    }
    rows = []
    for method, what, aims in (
        ("task", "gap to the equally trained original attention", (("half", 0.5), ("a tenth", 0.1))),
        ("distill", "KL of distillation", (("half", 0.5), ("a fifth", 0.2))),
    ):
        best = min(value.mean for value, _ in found[method])
        now = "; ".join(f"{value.mean:.2f} ± {value.error:.2f} ({extent})" for value, extent in found[method])
        for words, limit in aims:
            rows.append((f"{what}: at most {words} of the untrained one", now, "met" if best <= limit else "not met"))
            now = "the same"
    ablated = "no difference in loss after 60 to 100 steps ([7](#7-the-backward-and-the-export))"
    rows.append(("the ablations ordered as in the paper, or error bars that say otherwise", ablated, "error bars"))
    return table(("target", "share that is left, with the three options", ""), rows)


def _extent(size: str, seeds: int) -> str:
    return f"{trained.SIZES[size].steps} steps, {COUNTS[seeds]}"


def long_targets(entries: Entries, method: str) -> list[tuple[Estimate, str]]:
    found = []
    for size in (length.SHORT, length.LONG, length.LONGEST):
        arm = report_length.Arm(size, "full", method, ALL)
        if method == "task":
            gap = report_length.above_control(entries, arm, ALL)
            value = ratio(gap, report_length.untrained_gap(entries)) if gap else None
        else:
            kl = column(arm.runs(entries).values())(f"kl_{ALL}")
            value, gap = ratio(kl, column([entries["untrained/main"]])(f"kl_{PLAIN}")[0]) if kl else None, kl
        if value is not None:
            found.append((value, f"{arm.steps:,} steps on documentation, {COUNTS[len(gap)]}"))
    return found


@needs("trained", "servers_language", "servers_video")
def _quality(results: Results) -> str:
    """For README.md."""
    entries = results("trained")
    cache = [cost_of_the_cache(results, name).mean for name in ("untrained", "control", "task")]

    def gaps(option: str) -> list[float]:
        """To the original attention: the starting model's, its own for the control, and the control's for the trained model."""
        ours, theirs = paired(entries, "task", option, "main")
        trained_gap = estimate(difference(ours(f"loss_{option}"), theirs("loss_original")))
        return [*(above_its_own(entries, name, option).mean for name in ("untrained", "control")), trained_gap.mean]

    command = "`scripts.evidence.trained`"
    kls = [estimate(kl_of(entries, "untrained", ALL)).mean, estimate(kl_of(entries, "distill", ALL, option=ALL)).mean]
    psnr = [psnr_of(results, name).mean for name in ("untrained", "distill")]
    steps = trained.SIZES["main"].steps
    rows = [
        (
            f"NVFP4 KV cache: extra loss, nats per token, {STEPS:,} steps",
            "H200",
            *_numbers(cache),
            "`scripts.evidence.servers language`",
        ),
        (f"NVFP4 attention: gap in loss to original attention, {steps} steps", "H100", *_numbers(gaps(PLAIN)), command),
        ("the same with all three options", "H100", *_numbers(gaps(ALL)), command),
        *long_quality(results("length")),
        (
            f"all three options, {steps} steps, distilled: KL to the original model",
            "H100",
            f"{kls[0]:.3f}",
            "",
            f"**{kls[1]:.3f}**",
            command,
        ),
        (
            "SageAttention3 on a small Wan: PSNR to its original samples",
            "H200",
            f"{psnr[0]:.1f} dB",
            "",
            f"**{psnr[1]:.1f} dB** distilled",
            "`scripts.evidence.servers video`",
        ),
    ]
    head = ("what", "GPU", "not trained", "trained without 4 bits", "trained through 4 bits", "command: `python -m`")
    return table(head, rows)


def long_quality(entries: Entries) -> list[Sequence[str]]:
    """The row for all three options at the longest length that control and task loss were both run at, or no row."""
    for size in (length.LONGEST, length.LONG, length.SHORT):
        arm = report_length.Arm(size, "full", "task", ALL)
        _, controls = report_length.with_control(entries, arm)
        if controls:
            before = report_length.above_its_own([entries["untrained/main"]], ALL)
            after = [report_length.above_its_own(controls, ALL), estimate(report_length.above_control(entries, arm, ALL))]
            what = f"the same, {arm.steps:,} steps on documentation"
            device = devices_of(entries.values()).removeprefix("NVIDIA ")
            return [(what, device, *_numbers([before.mean, *(gap.mean for gap in after)]), "`scripts.evidence.length`")]
    return []


def _numbers(values: Sequence[float]) -> list[str]:
    return [*(f"{value:.3f}" for value in values[:-1]), f"**{values[-1]:.3f}**"]


TABLES = {"advice": _advice, "advice-first": _advice_first, "targets": _targets, "quality": _quality}
FIGURES: dict[str, Any] = {}
