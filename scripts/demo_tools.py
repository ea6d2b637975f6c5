"""Shared parts of the demos: running recipes and commands as users do, the table of losses, and the curves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from scripts.paths import RECIPES, ROOT

Records = list[dict[str, float]]


def launch(recipe: str, *arguments: str) -> str:
    """Run a recipe. Returns its output."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no"]
    # Accelerate would otherwise use a GPU.
    command += [f"--num_cpu_threads_per_process={os.cpu_count()}", str(RECIPES / recipe), *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def qat_patch(*arguments: str) -> None:
    """Run a command of qat-patch. Its output goes to the terminal."""
    subprocess.run([sys.executable, "-m", "qat_patch", *arguments], cwd=ROOT, check=True)


def read_metrics(run: Path) -> Records:
    """The log of a run: one record per step, with held-out losses before the first step and after the last."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def table(untrained: Mapping[str, Mapping[str, float]], qat: Records, control: Records) -> str:
    """The held-out losses in original and in 4-bit attention: rows before training by name, then the ends of both runs."""
    rows = [
        *untrained.items(),
        (f"after {qat[-1]['step']} steps through 4-bit attention", qat[-1]),
        (f"after {control[-1]['step']} steps through original attention (control)", control[-1]),
    ]
    lines = ["| held-out loss | original attention | 4-bit attention | gap |", "|---|---|---|---|"]
    for name, row in rows:
        original, fp4 = row["eval_loss_original"], row["eval_loss_fp4"]
        lines.append(f"| {name} | {original:.4f} | {fp4:.4f} | {fp4 - original:+.4f} |")
    return "\n".join(lines)


def plot(qat: Records, control: Records, file: Path) -> None:
    """Training losses and held-out losses over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5))
    for name, records, color in (("4-bit", qat, "tab:blue"), ("original", control, "tab:orange")):
        trained = f"trained through {name} attention{' (control)' if records is control else ''}"
        steps = [record for record in records if "loss" in record]
        losses = [record.get("task_loss", record["loss"]) for record in steps]  # where distilled, `loss` is another quantity
        left.plot([record["step"] for record in steps], losses, color=color, label=trained)
        measured = [record for record in records if "eval_loss_fp4" in record]
        for attention, style in (("fp4", "o-"), ("original", "o--")):
            label = f"{trained}, measured in {'4-bit' if attention == 'fp4' else 'original'} attention"
            losses = [record[f"eval_loss_{attention}"] for record in measured]
            right.plot([record["step"] for record in measured], losses, style, color=color, label=label)
    left.set(title="training loss", xlabel="step")
    right.set(title="held-out loss (lower is better)", xlabel="step")
    for axes in (left, right):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
