"""qat-patch sensitivity MODEL: inputs from a text, a prompt or files, then which layers suffer most from 4-bit attention."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from qat_patch.checkpoint.load import load_checkpoint
from qat_patch.checkpoint.manifest import MANIFEST
from qat_patch.config import AttnQATConfig
from qat_patch.measure.calibrate import calibrate
from qat_patch.measure.sensitivity import sensitivity
from qat_patch.patch import get_handle, patch_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write.

    Raises:
        ValueError: model and inputs do not fit together.
    """
    options = _parse(arguments)
    if options.calibration_exclude and not options.calibrate:
        raise ValueError("sensitivity: --calibration-exclude: expected --calibrate beside it, which measures the shifts")
    model = _patched(options)
    batches = _batches(options)
    if options.calibrate:
        calibrate(model, batches, exclude=options.calibration_exclude)
    report = sensitivity(model, batches)
    print(get_handle(model), report, sep="\n\n")
    if options.json is not None:
        options.json.write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")
    if options.png is not None:
        report.plot(options.png)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat-patch sensitivity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a model or pipeline, exported by this package or not")
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--text", type=Path, help="text file, for a language model with its tokenizer")
    inputs.add_argument("--prompt", help="for a pipeline, which then makes this")
    inputs.add_argument("--inputs", type=Path, nargs="+", help="safetensors files, each with the keyword arguments of a call")
    parser.add_argument("--batches", type=int, default=4, help="of --text: how many (default: 4)")
    parser.add_argument("--tokens", type=int, default=1024, help="of --text: tokens of a batch (default: 1024)")
    parser.add_argument(
        "--pipe", type=json.loads, default={}, help="JSON of more arguments for --prompt, such as '{\"height\": 480}'"
    )
    parser.add_argument("--config", type=Path, help="JSON of an AttnQATConfig; default: that of the export, else all in NVFP4")
    parser.add_argument("--calibrate", action="store_true", help="measure k_shift on the same inputs first, and use it")
    parser.add_argument(
        "--calibration-exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="of --calibrate: modules that get no shift, such as '*.attn2' of Wan's image to video",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it there (needs matplotlib)")
    return parser.parse_args(arguments)


def _patched(options: argparse.Namespace) -> Any:
    folder, dtype = options.model, "auto" if options.dtype is None else getattr(torch, options.dtype)
    if (folder / MANIFEST).is_file():
        if options.config is not None:
            raise ValueError(f"sensitivity: {folder} is an export, which says what is quantized: expected no --config")
        return load_checkpoint(folder, dtype=dtype, device=options.device)
    config = AttnQATConfig.from_json(options.config.read_text(encoding="utf-8")) if options.config is not None else None
    for_diffusers = {} if dtype == "auto" else {"dtype": dtype}
    if (folder / "model_index.json").is_file():
        from diffusers import DiffusionPipeline

        model = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **for_diffusers)
    elif "_class_name" in _json(folder / "config.json"):
        from diffusers import AutoModel

        model = AutoModel.from_pretrained(str(folder), local_files_only=True, **for_diffusers)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model = model.to(options.device)
    patch_model(model, config)
    return model


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"sensitivity: {file} does not exist; expected the folder of a model or a pipeline")
    return json.loads(file.read_text(encoding="utf-8"))


def _batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    is_pipeline = (options.model / "model_index.json").is_file()
    if is_pipeline != (options.prompt is not None):
        what = "a pipeline: expected --prompt" if is_pipeline else "a model: expected no --prompt"
        raise ValueError(f"sensitivity: {options.model} is {what}")
    if options.prompt is not None:
        return [{"prompt": options.prompt, "output_type": "latent"} | options.pipe]
    if options.inputs is not None:
        return [load_file(file, device=options.device) for file in options.inputs]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0].to(options.device)
    if len(ids) < options.tokens:
        raise ValueError(f"sensitivity: expected at least --tokens {options.tokens} in {options.text}, got {len(ids)}")
    rows = ids[: len(ids) // options.tokens * options.tokens].view(-1, 1, options.tokens)[: options.batches]
    return [{"input_ids": row, "use_cache": False} for row in rows]
