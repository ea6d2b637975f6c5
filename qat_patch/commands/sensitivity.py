"""Measure which layers lose most in 4-bit attention, on a text, a prompt or files.

qat-patch sensitivity Qwen/Qwen3-0.6B --preset kv_nvfp4 --text held_out.txt --png layers.png
qat-patch sensitivity Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A red boat" --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors.torch import load_file

from qat_kernels import QuantSpec
from qat_kernels.spec import Preset
from qat_patch.config import AttnQATConfig
from qat_patch.measure.calibrate import calibrate
from qat_patch.measure.sensitivity import sensitivity
from qat_patch.patch import get_handle, patch_model

from .models import (
    add_image_arguments,
    add_model_arguments,
    add_text_arguments,
    config_of,
    is_export,
    load_model,
    text_rows,
    with_images,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write.

    Raises:
        ValueError: model and inputs do not fit together.
    """
    options = _parse(arguments)
    if options.calibration_exclude and not options.calibrate:
        raise ValueError("sensitivity: --calibration-exclude: expected --calibrate with it, which measures the shifts")
    model = _patched(options)
    if options.prompt is None and (options.image or options.last_image):
        raise ValueError("sensitivity: --image and --last-image: expected --prompt with them; leave them out")
    is_pipeline = not isinstance(model, torch.nn.Module)
    model, images = with_images(model, options) if is_pipeline else (model, {})
    batches = _batches(options, images, is_pipeline=is_pipeline)
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
    add_model_arguments(parser)
    inputs = parser.add_mutually_exclusive_group(required=True)
    inputs.add_argument("--text", type=Path, help="text file, for a language model with its tokenizer")
    inputs.add_argument("--prompt", help="for a pipeline: the prompt to generate from")
    inputs.add_argument("--inputs", type=Path, nargs="+", help="safetensors files, each with the keyword arguments of one call")
    add_text_arguments(parser)
    add_image_arguments(parser)
    parser.add_argument(
        "--pipe", type=json.loads, default={}, help="JSON of more arguments for --prompt, such as '{\"height\": 480}'"
    )
    attention = parser.add_mutually_exclusive_group()
    attention.add_argument(
        "--config", type=Path, help="JSON of an AttnQATConfig; default: that of the export or model, else NVFP4"
    )
    attention.add_argument("--preset", choices=get_args(Preset), help="preset of QuantSpec for all modules")
    parser.add_argument(
        "--calibrate", action="store_true", help="measure k_shift and q_shift on the same inputs first, and use them"
    )
    parser.add_argument(
        "--calibration-exclude",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="with --calibrate: modules that get no shifts",
    )
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the result to this file (needs matplotlib)")
    return parser.parse_args(arguments)


def _patched(options: argparse.Namespace) -> Any:
    if is_export(options):
        for name in ("config", "preset"):
            if getattr(options, name) is not None:
                raise ValueError(f"sensitivity: {options.model} is an export, which says what is quantized: expected no --{name}")
        return load_model(options)
    config = config_of(options)
    if options.preset is not None:
        config = AttnQATConfig(spec=QuantSpec(preset=options.preset))
    model = load_model(options)
    # A model that save_pretrained wrote while it was patched is patched already.
    if config is not None or get_handle(model) is None:
        patch_model(model, config)
    return model


def _batches(options: argparse.Namespace, images: dict[str, Any], *, is_pipeline: bool) -> list[dict[str, Any]]:
    if is_pipeline != (options.prompt is not None):
        what = "a pipeline: expected --prompt" if is_pipeline else "a model: expected no --prompt"
        raise ValueError(f"sensitivity: {options.model} is {what}")
    if options.prompt is not None:
        return [{"prompt": options.prompt, "output_type": "latent"} | options.pipe | images]
    if options.inputs is not None:
        return [load_file(file, device=options.device) for file in options.inputs]
    return [{"input_ids": row, "use_cache": False} for row in text_rows(options)]
