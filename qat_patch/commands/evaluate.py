"""What a model loses in 4-bit attention, before any training: the same text, tasks or noise in each attention.

qat-patch evaluate Qwen/Qwen3-0.6B --attention original,nvfp4,kv_nvfp4 --text held_out.txt
qat-patch evaluate outputs/run/export --tasks hellaswag,arc_easy --limit 100
qat-patch evaluate Wan-AI/Wan2.1-T2V-1.3B-Diffusers --attention original,sage3 --prompt "A red boat" --dtype bfloat16

Attentions are `original`, the presets of QuantSpec (`qat-patch servers` lists them and their servers), and for an export
`exported`, its own. The reference is the original attention: KL, PSNR and SSIM compare with it. Loss and KL are nats per token.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qat_patch.checkpoint.trust.download import export_folder
from qat_patch.config import AttnQATConfig
from qat_patch.measure.harness import run_tasks
from qat_patch.measure.quality import EXPORTED, ORIGINAL, Attentions, sample_quality, text_quality

from .generate import make_pipeline
from .models import (
    add_image_arguments,
    add_model_arguments,
    add_text_arguments,
    config_of,
    is_export,
    load_model,
    load_tokenizer_of,
    text_rows,
    with_images,
)

_OF_TASKS = ("include_path", "num_fewshot", "limit", "batch_size")
_OF_SAMPLES = ("seeds", "pipe", "pipeline", "component", "image", "last_image")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write.

    Raises:
        ValueError: the model cannot run an attention, inputs do not fit it, or a setting has no effect.
    """
    options = _parse(arguments)
    for wanted, names in (("tasks", _OF_TASKS), ("prompt", _OF_SAMPLES)):
        for name in names:
            if getattr(options, name) is not None and getattr(options, wanted) is None:
                raise ValueError(f"--{name.replace('_', '-')}: has no effect without --{wanted}; leave it out")
    if options.json is not None and options.json.exists():
        raise ValueError(f"--json: {options.json} exists; choose another file")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ValueError(f"--json: {options.json.absolute().parent} is not a folder; create it first")
    for name in ("limit", "batch_size", "seeds"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {number}")
    if options.exclude and options.config is not None:
        raise ValueError("--exclude: has no effect with --config, which says what is left out; write it there")
    if options.tasks is not None:
        found, text = _tasks(options)
    else:
        report = _samples(options) if options.prompt is not None else _text(options)
        found, text = report.to_dict(), str(report)
    print(text)
    if options.json is not None:
        options.json.write_text(json.dumps({"model": options.model} | found, indent=1) + "\n", encoding="utf-8")


def _text(options: argparse.Namespace) -> Any:
    rows, model = text_rows(options), load_model(options)
    if not hasattr(model, "get_input_embeddings"):
        raise ValueError(f"--text: expected a language model, got {type(model).__name__}; a pipeline needs --prompt")
    _check_tokens("--text", model, max(int(row.max()) for row in rows))
    with Attentions(model, _names(options, "kv_nvfp4"), _config(options)) as attentions:
        return text_quality(model, rows, attentions)


def _samples(options: argparse.Namespace) -> Any:
    if is_export(options):
        dtype = getattr(torch, options.dtype or "float32")
        folder = export_folder(options.model, options.revision)
        pipe = make_pipeline(folder, options.pipeline, dtype, component=options.component).to(options.device)
        pipe.set_progress_bar_config(disable=True)
    elif options.pipeline is not None or options.component is not None:
        raise ValueError(f"--pipeline and --component: only for an export of a transformer alone, and {options.model} is not one")
    else:
        pipe = load_model(options)
    if isinstance(pipe, torch.nn.Module):
        raise ValueError(f"--prompt: expected a pipeline, got a {type(pipe).__name__}; a language model needs --text or --tasks")
    pipe, images = with_images(pipe, options)
    seeds = 1 if options.seeds is None else options.seeds
    with Attentions(pipe, _names(options, "sage3"), _config(options)) as attentions:
        return sample_quality(pipe, options.prompt, attentions, seeds=seeds, arguments=(options.pipe or {}) | images)


def _tasks(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    def load() -> Any:
        model, tokenizer = load_model(options), load_tokenizer_of(options)
        _check_tokens("--tasks", model, max(tokenizer.get_vocab().values()))
        attentions = Attentions(model, _names(options, "kv_nvfp4"), _config(options))
        by_name = {name: functools.partial(attentions.in_force, name) for name in attentions.names}
        return model, tokenizer, by_name

    given = {name: getattr(options, name) for name in _OF_TASKS if getattr(options, name) is not None}
    found = run_tasks(load, options.tasks.split(","), **given)
    lines = [f"{'task':24} {'metric':28} " + " ".join(f"{name:>16}" for name in found)]
    for task, values in found[ORIGINAL].items():
        for metric in values:
            cells = " ".join(f"{of_attention[task].get(metric, float('nan')):16.4f}" for of_attention in found.values())
            lines.append(f"{task:24} {metric:28} {cells}")
    return {"attentions": found}, "\n".join(lines)


def _check_tokens(option: str, model: Any, largest: int) -> None:
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise ValueError(
            f"{option}: the tokenizer makes token {largest}, and the model knows {known}; they do not belong together"
        )


def _names(options: argparse.Namespace, of_a_server: str) -> list[str]:
    if options.attention is not None:
        return options.attention.split(",")
    return [ORIGINAL, EXPORTED] if is_export(options) else [ORIGINAL, "nvfp4", of_a_server]


def _config(options: argparse.Namespace) -> AttnQATConfig | None:
    return AttnQATConfig(exclude=tuple(options.exclude)) if options.exclude else config_of(options)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat-patch evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--attention", metavar="NAME,NAME", help="default: original and, of an export, exported; else nvfp4 and kv_nvfp4 or sage3"
    )
    parser.add_argument("--config", type=Path, help="JSON of an AttnQATConfig that selects the modules (default: all)")
    parser.add_argument("--exclude", nargs="+", metavar="PATTERN", help="modules that keep their original attention")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--text", type=Path, metavar="FILE", help="text file, for a language model with its tokenizer")
    inputs.add_argument("--tasks", metavar="TASK,TASK", help="tasks of lm-evaluation-harness (pip install 'qat-patch[harness]')")
    inputs.add_argument("--prompt", nargs="+", help="for a pipeline: the prompts to generate from")
    add_text_arguments(parser)
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--include-path", metavar="FOLDER", help="a folder with your own tasks")
    tasks.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    tasks.add_argument("--limit", type=int, metavar="N", help="use only the first N documents of a task")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: 1)")
    samples = parser.add_argument_group("samples")
    samples.add_argument("--seeds", type=int, metavar="N", help="samples for each prompt (default: 1)")
    samples.add_argument("--pipeline", help="for an export of a transformer alone: folder or Hub name of the whole pipeline")
    samples.add_argument("--component", help="which transformer of that pipeline the export is, if it does not say so")
    add_image_arguments(samples)
    samples.add_argument("--pipe", type=json.loads, metavar="JSON", help="more arguments of the pipeline: '{\"height\": 480}'")
    return parser.parse_args(arguments)
