"""Generate with an export: text with a language model, video with a Wan transformer or pipeline. Says which attention ran.

qat-patch generate outputs/run/export --prompt "To be, or not to be"
qat-patch generate outputs/wan/export --pipeline Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A red boat" --output boat.mp4
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qat_patch.checkpoint.load import load_checkpoint
from qat_patch.handle import PatchHandle
from qat_patch.patch import require_handle

_TEXT_ONLY = ("max_new_tokens", "min_new_tokens")
_VIDEO_ONLY = (
    "output",
    "pipeline",
    "prompt_embeds",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "steps",
    "guidance_scale",
    "seed",
    "fps",
    "original_first",
    "original_last",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate as the command line says; prints text, or writes a video."""
    options = _parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_video = (options.folder / "model_index.json").is_file() or _is_diffusers(options.folder)
    for name in _TEXT_ONLY if is_video else _VIDEO_ONLY:
        if getattr(options, name) is not None:
            kind = "video" if is_video else "text"
            raise ValueError(f"--{name.replace('_', '-')}: has no effect, for {options.folder} generates {kind}; leave it out")
    handle = (_video if is_video else _text)(options, device)
    total = len(handle.patched) + len(handle.skipped)
    print(f"\n[4-bit attention in {len(handle.patched)} of {total} attention modules; eager implementation, {device}]")


def _text(options: argparse.Namespace, device: str) -> PatchHandle:
    from transformers import AutoTokenizer

    if options.prompt is None:
        raise ValueError("--prompt: needed to generate text")
    model = load_checkpoint(options.folder, device=device)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    limits = {name: getattr(options, name) for name in _TEXT_ONLY if getattr(options, name) is not None}
    handle = require_handle(model)
    cache = {"past_key_values": handle.cache()} if all(x.spec.pv == "nvfp4" for x in handle.patched.values()) else {}
    tokens = model.generate(**inputs, **cache, **{"max_new_tokens": 64} | limits, do_sample=False)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    return handle


def _video(options: argparse.Namespace, device: str) -> PatchHandle:
    from diffusers.utils import encode_video

    if options.output is None or (options.prompt is None) == (options.prompt_embeds is None):
        raise ValueError("a video needs --output FILE.mp4 and one of --prompt and --prompt-embeds")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    pipe = make_pipeline(options.folder, options.pipeline, dtype, needs_text=options.prompt_embeds is None).to(device)
    handle = require_handle(pipe)
    names = {"steps": "num_inference_steps"}
    call: dict[str, Any] = {
        names.get(name, name): getattr(options, name)
        for name in ("prompt", "negative_prompt", "height", "width", "num_frames", "steps", "guidance_scale")
        if getattr(options, name) is not None
    }
    if options.prompt_embeds is not None:
        call |= _embeds(options.prompt_embeds, device, dtype)
    generator = torch.Generator().manual_seed(options.seed or 0)
    with contextlib.ExitStack() as stack:
        if options.original_first or options.original_last:
            steps = handle.original_steps(first=options.original_first or 0, last=options.original_last or 0)
            call["callback_on_step_end"] = stack.enter_context(steps)
        frames = pipe(**call, generator=generator, output_type="np").frames[0]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    encode_video(frames, options.fps or 16, str(options.output))
    print(f"{options.output}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}")
    return handle


def make_pipeline(folder: Path, pipeline: str | None, dtype: torch.dtype, *, needs_text: bool = True) -> Any:
    """A pipeline with patched transformer: of an export of one, or of a transformer alone within the pipeline that is named.

    Raises:
        ValueError: `pipeline` is missing, or has no effect.
    """
    import diffusers

    model = load_checkpoint(folder, dtype=dtype)
    if not isinstance(model, torch.nn.Module):
        if pipeline is not None:
            raise ValueError(f"--pipeline: has no effect, for {folder} is a whole pipeline; leave it out")
        return model
    if pipeline is None:
        raise ValueError(
            f"--pipeline: {folder} is a transformer alone; name the pipeline that it was fine-tuned from, for its VAE, "
            "text encoder and scheduler"
        )
    text_encoder = {} if needs_text else {"text_encoder": None, "tokenizer": None}
    # By its own class: DiffusionPipeline.from_pretrained drops a transformer that it is given, and loads the stored one.
    pipeline_class = getattr(diffusers, diffusers.DiffusionPipeline.load_config(pipeline)["_class_name"])
    return pipeline_class.from_pretrained(pipeline, transformer=model, dtype=dtype, **text_encoder)


def _embeds(file: Path, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`prompt_embeds` [tokens, D] of a file of prepared data, and `negative_prompt_embeds` if there are any."""
    from safetensors.torch import load_file

    tensors = {name: x for name, x in load_file(file).items() if name in ("prompt_embeds", "negative_prompt_embeds")}
    if "prompt_embeds" not in tensors:
        raise ValueError(f"--prompt-embeds: {file} holds no prompt_embeds; expected a file of qat-patch prepare-wan-data")
    padded = {name: torch.nn.functional.pad(x, (0, 0, 0, 512 - len(x)))[None] for name, x in tensors.items()}
    padded.setdefault("negative_prompt_embeds", torch.zeros_like(padded["prompt_embeds"]))
    return {name: x.to(device, dtype) for name, x in padded.items()}


def _is_diffusers(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "_class_name" in json.loads(config.read_text(encoding="utf-8"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat-patch generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="what export_checkpoint wrote")
    parser.add_argument("--prompt", help="text to continue, or what the video shows")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    text = parser.add_argument_group("text")
    text.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after so many (default: 64)")
    text.add_argument("--min-new-tokens", type=int, metavar="N", help="do not stop before so many (default: 0)")
    video = parser.add_argument_group("video")
    video.add_argument("--output", type=Path, metavar="FILE.mp4", help="where to")
    video.add_argument("--pipeline", help="for an export of a transformer alone: folder or Hub name of the whole pipeline")
    video.add_argument("--prompt-embeds", type=Path, metavar="FILE", help="instead of --prompt: a clip of prepare-wan-data")
    video.add_argument("--negative-prompt", help="what the video does not show")
    for name, what in (("height", "pixels"), ("width", "pixels"), ("num-frames", "4n + 1"), ("steps", "denoising steps")):
        video.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: the pipeline's)")
    video.add_argument("--guidance-scale", type=float, help="(default: the pipeline's)")
    video.add_argument("--seed", type=int, help="of the noise (default: 0)")
    video.add_argument("--fps", type=int, help="of the file (default: 16, Wan 2.1's)")
    video.add_argument("--original-first", type=int, metavar="N", help="run the first N denoising steps in original attention")
    video.add_argument("--original-last", type=int, metavar="N", help="run the last N denoising steps in original attention")
    return parser.parse_args(arguments)
