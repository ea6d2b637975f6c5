"""Make videos for a list of prompts with a Wan export, several for each, in original or 4-bit attention, for VBench.

python -m scripts.sample_prompts outputs/wan/export --prompts VBench_full_info.json --output videos/fp4 --attention fp4

The list is VBench's `VBench_full_info.json`, which is part of its repository and has to be downloaded, or a text file with a
prompt a line. Files are named as VBench wants them, PROMPT-NUMBER.mp4. What is there already is not made again, so a run that
was interrupted goes on. Scoring is VBench's own (`pip install vbench`), and downloads its models:

    vbench evaluate --videos_path videos/fp4 --dimension subject_consistency
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qat_patch import get_handle
from qat_patch.commands.generate import checked, make_pipeline
from scripts.arguments import new_parser

_LONGEST = 180
"""The number of characters of a prompt in a file name; VBench cuts there too."""


def main(arguments: Sequence[str] | None = None) -> list[Path]:
    """Sample as the command line says. Returns the files in the order of the prompts.

    Raises:
        ValueError: the list cannot be read, or prompts would overwrite each other.
    """
    from diffusers.utils import encode_video

    options = _parse(arguments)
    prompts = read_prompts(options.prompts, options.dimension)[: options.limit]
    names = [prompt[:_LONGEST].replace("/", "_") for prompt in prompts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"--prompts: {len(twice)} prompts would have the same file, {twice[0]!r} for one; remove one of them")
    wanted = [
        (options.output / f"{name}-{number}.mp4", prompt, number)
        for prompt, name in zip(prompts, names, strict=True)
        for number in range(options.samples)
    ]
    missing = [entry for entry in wanted if not entry[0].exists()]
    print(f"{len(prompts)} prompts, {len(missing)} of {len(wanted)} videos to make")
    if not missing:
        return [file for file, _, _ in wanted]
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipe = make_pipeline(options.folder, options.pipeline, dtype, component=options.component)
    if options.attention != "original":
        checked(get_handle(pipe), device)
    pipe = pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    options.output.mkdir(parents=True, exist_ok=True)
    renamed = {"steps": "num_inference_steps"}
    size: dict[str, Any] = {
        renamed.get(name, name): getattr(options, name)
        for name in ("height", "width", "num_frames", "steps", "guidance_scale")
        if getattr(options, name) is not None
    }
    with get_handle(pipe).disabled() if options.attention == "original" else contextlib.nullcontext():
        for count, (file, prompt, number) in enumerate(missing, 1):
            # On the CPU and seeded by number only: the same noise on every machine and for both kinds of attention.
            noise = torch.Generator().manual_seed(options.seed + number)
            frames = pipe(prompt, **size, generator=noise, output_type="np").frames[0]
            # A half-written video must not count as finished.
            aside = file.with_name(f".{file.name}.partial.mp4")
            encode_video(frames, options.fps, str(aside))
            os.replace(aside, file)
            print(f"{count}/{len(missing)} {file.name}", flush=True)
    return [file for file, _, _ in wanted]


def read_prompts(file: Path, dimension: str | None) -> list[str]:
    """The prompts of a list, each once, in order; for VBench's list those of one dimension, or all.

    Raises:
        ValueError: the file or dimension does not exist, or the file is not a list of prompts.
    """
    if not file.is_file():
        raise ValueError(
            f"--prompts: there is no {file}; expected a text file, or VBench_full_info.json from the repository Vchitect/VBench"
        )
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        if dimension is not None:
            raise ValueError(f"--dimension: only VBench's list has dimensions, and {file} is a text file; leave it out")
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    else:
        try:
            entries = [(entry["prompt_en"], entry["dimension"]) for entry in json.loads(text)]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"--prompts: {file}: expected VBench's list of prompt_en and dimension: {error!r}") from error
        known = sorted({name for _, dimensions in entries for name in dimensions})
        if dimension is not None and dimension not in known:
            raise ValueError(f"--dimension: expected one of {', '.join(known)}, got {dimension!r}")
        prompts = [prompt for prompt, dimensions in entries if dimension is None or dimension in dimensions]
    if not prompts:
        raise ValueError(f"--prompts: there are none in {file}")
    return list(dict.fromkeys(prompts))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("scripts.sample_prompts", __doc__)
    parser.add_argument("folder", type=Path, help="folder of export_checkpoint: a pipeline, or a transformer alone")
    parser.add_argument(
        "--prompts", type=Path, required=True, help="VBench_full_info.json, or a text file with a prompt per line"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the videos")
    parser.add_argument("--attention", choices=["original", "fp4"], default="fp4", help="(default: fp4)")
    parser.add_argument("--dimension", help="only the prompts of one of VBench's dimensions")
    parser.add_argument("--samples", type=int, default=5, help="videos for each prompt (default: 5, VBench's number)")
    parser.add_argument("--limit", type=int, help="use only the first N prompts")
    parser.add_argument("--pipeline", help="for an export of a transformer alone: folder or Hub name of the whole pipeline")
    parser.add_argument("--component", help="which transformer of that pipeline the export is, if it does not say so")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    for name, what in (("height", "pixels"), ("width", "pixels"), ("num-frames", "4n + 1"), ("steps", "denoising steps")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: the pipeline's)")
    parser.add_argument("--guidance-scale", type=float, help="(default: the pipeline's)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of each prompt's first video; the next videos have the next seeds"
    )
    parser.add_argument("--fps", type=int, default=16, help="frames per second of the files (default: 16, as Wan 2.1)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
