"""Generate text or video with an export: a language model, a Wan transformer or a pipeline. It prints which attention ran.

qat-patch generate outputs/run/export --prompt "To be, or not to be"
qat-patch generate outputs/wan/export --pipeline Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A red boat" --output boat.mp4
qat-patch generate outputs/wan/export --pipeline Wan-AI/Wan2.2-TI2V-5B-Diffusers --prompt Boat --image boat.png --output boat.mp4
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from qat_kernels import KVCache
from qat_kernels.dispatch import SPEED
from qat_kernels.ran import counted
from qat_kernels.verdicts import Case
from qat_patch.checkpoint.adapters import LORA_FILE
from qat_patch.checkpoint.load import component_of, load_checkpoint, load_tokenizer
from qat_patch.checkpoint.trust.download import export_folder
from qat_patch.checkpoint.trust.opening import printable
from qat_patch.handle import PatchHandle
from qat_patch.metadata import LOADING_ADAPTERS
from qat_patch.patch import require_handle
from qat_patch.self_check.store import FOLDER

from .models import add_image_arguments, transformers_in, with_images

_CHECKED: set[tuple[torch.device, Case]] = set()
"""What this process has checked already, even if the verdict could not be saved."""
_TEXT_ONLY = ("max_new_tokens", "min_new_tokens")
_VIDEO_ONLY = (
    "output",
    "pipeline",
    "component",
    "prompt_embeds",
    "image",
    "last_image",
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
    """Generate as the command line says: print text, or write a video."""
    options = _parse(arguments)
    options.folder = export_folder(options.folder, options.revision)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    is_video = any(_is_diffusers(folder) for folder in transformers_in(options.folder) or [options.folder])
    for name in _TEXT_ONLY if is_video else _VIDEO_ONLY:
        if getattr(options, name) is not None:
            kind = "video" if is_video else "text"
            raise ValueError(f"--{name.replace('_', '-')}: has no effect: {options.folder} generates {kind}; leave it out")
    handle, run = (_video if is_video else _text)(options, device)
    print(f"\n{run}")
    modules = f"{len(handle.patched)} of {len(handle.patched) + len(handle.skipped)} attention modules"
    ran = " and ".join(name for name in SPEED if run.calls[name]) or "no"
    print(f"[4-bit attention in {modules}; {ran} implementation, {device}]")


@dataclasses.dataclass
class Run:
    """The time and memory that generation took, and what really ran."""

    calls: Counter[str]
    """The number of 4-bit attention calls by implementation."""
    seconds: float
    made: int
    """The number of tokens or frames."""
    unit: str
    peak: int
    """Bytes of GPU memory, or of this process."""

    def __str__(self) -> str:
        calls = ", ".join(f"{count} {name}" for name, count in self.calls.items()) or "none"
        speed = f"{self.made} {self.unit} in {self.seconds:.2f} s, {self.made / self.seconds:.2f} {self.unit}/s"
        return f"[calls of 4-bit attention: {calls}; {speed}; peak memory {self.peak / 2**30:.2f} GiB]"


@contextlib.contextmanager
def measured(device: str, unit: str) -> Iterator[Run]:
    """Count calls and measure time inside. The caller sets how much was generated."""
    on_gpu = torch.device(device).type == "cuda"
    run = Run(calls=Counter(), seconds=0.0, made=0, unit=unit, peak=0)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    with counted() as run.calls:
        yield run
    if on_gpu:
        torch.cuda.synchronize(device)
    run.seconds = time.perf_counter() - began
    run.peak = torch.cuda.max_memory_allocated(device) if on_gpu else _peak_of_process()


def _peak_of_process() -> int:
    """Bytes: Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def checked(handle: PatchHandle, device: str) -> None:
    """Run the self-check for calls that may use FP4 units and are not checked yet, before a model takes the memory."""
    where = torch.device(device)
    if where.type == "cuda":
        where = torch.device("cuda", torch.cuda.current_device() if where.index is None else where.index)
    missing = {(where, case) for case in handle.unchecked(where)}
    if not missing - _CHECKED:
        return
    print("self-check of FP4 units, once for this machine: it takes minutes", flush=True)
    report = handle.check(where)
    _CHECKED.update(missing)
    print(report)
    if not all(each.is_kept for each in report.checked):
        print(
            "some results could not be saved: there `auto` takes triton, and the next start checks again. "
            f"Set {FOLDER} to a folder that can be written to"
        )
    print()


def _text(options: argparse.Namespace, device: str) -> tuple[PatchHandle, Run]:
    if options.prompt is None:
        raise ValueError("--prompt: needed to generate text")
    tokenizer = load_tokenizer(options.folder)
    model = load_checkpoint(options.folder)
    checked(require_handle(model), device)
    model = model.to(device)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(device)
    if not inputs["input_ids"].numel():
        raise ValueError("--prompt: expected at least one token, got none from the tokenizer; write a longer prompt")
    limits = {name: getattr(options, name) for name in _TEXT_ONLY if getattr(options, name) is not None}
    handle = require_handle(model)
    has_cache = any(x.spec.preset in KVCache.presets for x in handle.patched.values())
    with handle.cached() if has_cache else contextlib.nullcontext(), measured(device, "tokens") as run:
        tokens = model.generate(**inputs, **{"max_new_tokens": 64} | limits, do_sample=False)
        run.made = tokens.shape[1] - (0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1])
    print(printable(tokenizer.decode(tokens[0], skip_special_tokens=True)))
    return handle, run


def _video(options: argparse.Namespace, device: str) -> tuple[PatchHandle, Run]:
    from diffusers.utils import encode_video

    if options.output is None or (options.prompt is None) == (options.prompt_embeds is None):
        raise ValueError("a video needs --output FILE.mp4 and one of --prompt and --prompt-embeds")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    needs_text = options.prompt_embeds is None
    pipe = make_pipeline(options.folder, options.pipeline, dtype, component=options.component, needs_text=needs_text)
    pipe, images = with_images(pipe, options)
    handle = require_handle(pipe)
    checked(handle, device)
    pipe = pipe.to(device)
    names = {"steps": "num_inference_steps"}
    call: dict[str, Any] = {
        names.get(name, name): getattr(options, name)
        for name in ("prompt", "negative_prompt", "height", "width", "num_frames", "steps", "guidance_scale")
        if getattr(options, name) is not None
    } | images
    if options.prompt_embeds is not None:
        call |= _embeds(options.prompt_embeds, device, dtype)
    generator = torch.Generator().manual_seed(options.seed or 0)
    with contextlib.ExitStack() as stack:
        if options.original_first or options.original_last:
            steps = handle.original_steps(first=options.original_first or 0, last=options.original_last or 0)
            call["callback_on_step_end"] = stack.enter_context(steps)
        run = stack.enter_context(measured(device, "frames"))
        frames = pipe(**call, generator=generator, output_type="np").frames[0]
        run.made = len(frames)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    encode_video(frames, options.fps or 16, str(options.output))
    print(f"{options.output}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]}")
    return handle, run


def make_pipeline(
    folder: Path, pipeline: str | None, dtype: torch.dtype, *, component: str | None = None, needs_text: bool = True
) -> Any:
    """A pipeline with patched transformers: from the export of a pipeline, or from that of transformers and `pipeline`.

    Args:
        folder: what `export_checkpoint` wrote, or a folder with the exports of several transformers of one pipeline.
        pipeline: for an export of a transformer alone: folder or Hub name of the pipeline around it.
        dtype: dtype of the weights.
        component: which transformer of the pipeline it replaces, if the export does not say so.
        needs_text: whether the pipeline must encode prompts.

    Raises:
        ValueError: `pipeline` is missing or has no effect, or it is unclear which transformer of the pipeline was exported.
    """
    import diffusers

    folders = transformers_in(folder) or [folder]
    models = [load_checkpoint(each, dtype=dtype) for each in folders]
    if not isinstance(models[0], torch.nn.Module):
        for option, value in (("pipeline", pipeline), ("component", component)):
            if value is not None:
                raise ValueError(f"--{option}: has no effect: {folder} is a whole pipeline; leave it out")
        return models[0]
    if pipeline is None:
        raise ValueError(
            f"--pipeline: {folder} is a transformer alone; name the pipeline that it was fine-tuned from, for its VAE, "
            "text encoder and scheduler"
        )
    text_encoder = {} if needs_text else {"text_encoder": None, "tokenizer": None}
    # With its own class: DiffusionPipeline.from_pretrained ignores the transformer that we pass, and loads the stored one.
    config = diffusers.DiffusionPipeline.load_config(pipeline)
    parts = {_slot(each, component, pipeline, config): model for each, model in zip(folders, models, strict=True)}
    return getattr(diffusers, config["_class_name"]).from_pretrained(pipeline, **parts, dtype=dtype, **text_encoder)


def _slot(folder: Path, component: str | None, pipeline: str, config: dict[str, Any]) -> str:
    """The component of a pipeline that an exported transformer replaces."""
    stored = component_of(folder)
    if component is not None and stored not in (None, component):
        raise ValueError(f"--component: {folder} is an export of {stored}, got {component}; leave it out")
    known = [name for name in LOADING_ADAPTERS if config.get(name) not in (None, [None, None])]
    component = component or stored or (known[0] if len(known) == 1 else None)
    if component is None:
        raise ValueError(
            f"--component: {pipeline} has {' and '.join(known)}, and {folder} does not say which of them it is; name it, or "
            "export again with component=..."
        )
    if component not in known:
        raise ValueError(f"--pipeline: {folder} is an export of {component}, and {pipeline} has only {', '.join(known)}")
    return component


def _embeds(file: Path, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`prompt_embeds` [tokens, D] from a file of prepared data, and `negative_prompt_embeds` if it has them."""
    from safetensors.torch import load_file

    tensors = {name: x for name, x in load_file(file).items() if name in ("prompt_embeds", "negative_prompt_embeds")}
    if "prompt_embeds" not in tensors:
        raise ValueError(f"--prompt-embeds: {file} holds no prompt_embeds; expected a file of qat-patch prepare-wan-data")
    padded = {name: torch.nn.functional.pad(x, (0, 0, 0, 512 - len(x)))[None] for name, x in tensors.items()}
    padded.setdefault("negative_prompt_embeds", torch.zeros_like(padded["prompt_embeds"]))
    return {name: x.to(device, dtype) for name, x in padded.items()}


def _is_diffusers(folder: Path) -> bool:
    """Whether a folder holds a pipeline, a model or adapters of Diffusers."""
    if (folder / "model_index.json").is_file() or (folder / LORA_FILE).is_file():
        return True
    config = folder / "config.json"
    return config.is_file() and "_class_name" in json.loads(config.read_text(encoding="utf-8"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat-patch generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        type=Path,
        help="what export_checkpoint wrote, or its name on the Hub; or the export folder of a run that trained both transformers",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument("--prompt", help="text to continue, or a description of the video")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    text = parser.add_argument_group("text")
    text.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after N tokens (default: 64)")
    text.add_argument("--min-new-tokens", type=int, metavar="N", help="do not stop before N tokens (default: 0)")
    video = parser.add_argument_group("video")
    video.add_argument("--output", type=Path, metavar="FILE.mp4", help="the file to write")
    video.add_argument("--pipeline", help="for an export of a transformer alone: folder or Hub name of the whole pipeline")
    video.add_argument("--component", help="which transformer of that pipeline the export is, if it does not say so")
    video.add_argument("--prompt-embeds", type=Path, metavar="FILE", help="instead of --prompt: a clip of prepare-wan-data")
    add_image_arguments(video)
    video.add_argument("--negative-prompt", help="what the video should not show")
    for name, what in (("height", "pixels"), ("width", "pixels"), ("num-frames", "4n + 1"), ("steps", "denoising steps")):
        video.add_argument(f"--{name}", type=int, metavar="N", help=f"{what} (default: the pipeline's)")
    video.add_argument("--guidance-scale", type=float, help="(default: the pipeline's)")
    video.add_argument("--seed", type=int, help="seed of the noise (default: 0)")
    video.add_argument("--fps", type=int, help="frames per second of the file (default: 16, as Wan 2.1)")
    video.add_argument("--original-first", type=int, metavar="N", help="run the first N denoising steps in original attention")
    video.add_argument("--original-last", type=int, metavar="N", help="run the last N denoising steps in original attention")
    return parser.parse_args(arguments)
