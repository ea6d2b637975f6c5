"""Encode videos and captions once, by the VAE and the text encoder of a Wan pipeline, to train its transformer on them.

qat-patch prepare-wan-data --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --input clips --output latents

--input holds metadata.jsonl or metadata.csv, or pairs of clip.mp4 and clip.txt. Tables of DiffSynth-Studio (video or image,
prompt), musubi-tuner (video_path or image_path, caption) and finetrainers (file_name, caption) work as they are; a column text
counts as caption. In metadata.jsonl, captions is a list of texts; each step draws one. A video gives --windows clips, spread
evenly (default: one, from the start), at --fps. Each has the largest of --num-frames that the video fills, resized and
centre-cropped to the --resolutions with the nearest aspect ratio. An image is a clip of one frame (not for image to video).
Unusable clips are reported and left out.

--output gets index.json, empty_caption.safetensors, and one safetensors file a window:
    latents        [C, F, h, w]      mean of the VAE's posterior, normalized as in the pipeline
    prompt_embeds  [tokens, D]       of the caption; the zeros that fill it up to 512 tokens are left out. Of further captions
                                     prompt_embeds.1 and so on
    condition      [4 + C, F, h, w]  image to video only: mask and latents of the first frame, or of the first and the last
    image_embeds   [257, D]          image to video only, and not in Wan 2.2: the first frame, by the image encoder;
                                     [2, 257, D] with the last frame

Run it again to continue after an interruption, or after adding clips, captions, windows, resolutions or lengths: clips whose
captions and video have not changed are not encoded again. Files made with other encoders or settings are refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline, WanTransformer3DModel
from diffusers.training_utils import free_memory
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from qat_patch.checkpoint import lock

from .clip_captions import Clip, list_clips
from .clip_index import ASIDE, EMPTY_CAPTION, INDEX, write_index, written_aside
from .encoded_clips import entry, file_of, finished, record_of
from .wan_clips import Frames, Windows

TEXT_LENGTH = 512
"""The number of tokens that the pipelines pad prompts to."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Encode the clips that the command line names, and write the index.

    Raises:
        ValueError: the input cannot be read, the model is not a Wan pipeline, sizes do not fit it, the output folder was made
            with other settings or is in use by another process, or no clip is usable.
    """
    args = _parse(arguments)
    if args.fps <= 0:
        raise ValueError(f"--fps: expected a positive number, got {args.fps:g}")
    if args.windows < 1:
        raise ValueError(f"--windows: expected at least 1, got {args.windows}")
    clips, skipped = list_clips(args.input)
    _encode_all(args, clips, skipped)
    # The pipeline is out of scope here, so its memory is free again.
    free_memory()


def load_pipeline(model: str, dtype: torch.dtype, device: str) -> WanPipeline | WanImageToVideoPipeline:
    """A Wan pipeline without its transformers: the VAE and the image encoder in float32, the text encoder in `dtype`.

    Raises:
        ValueError: the pipeline does not exist, or is not one of Wan's.
    """
    try:
        config = DiffusionPipeline.load_config(model)
    except OSError as error:
        raise ValueError(f"--model: expected a folder or Hub name of a Diffusers pipeline, got {model}: {error}") from error
    kinds = {kind.__name__: kind for kind in (WanPipeline, WanImageToVideoPipeline)}
    kind = kinds.get(config["_class_name"])
    if kind is None:
        raise ValueError(f"--model: expected one of {', '.join(kinds)}, got {model}, a {config['_class_name']}")
    if kind is WanImageToVideoPipeline and config.get("expand_timesteps"):
        raise ValueError(
            f"--model: {model} is a {kind.__name__} with expand_timesteps; give it as a WanPipeline, whose clips serve runs "
            "with and without a first frame"
        )
    # Only the pipeline's own class can leave out the transformers; DiffusionPipeline would load them.
    types = {"default": dtype, "vae": torch.float32, "image_encoder": torch.float32}
    return kind.from_pretrained(model, transformer=None, transformer_2=None, dtype=types).to(device)


def takes_last_frame(model: str) -> bool:
    """Whether the transformer of a pipeline is one for a first and a last frame.

    Raises:
        ValueError: its config is not there.
    """
    try:
        config = WanTransformer3DModel.load_config(model, subfolder="transformer")
    except OSError as error:
        raise ValueError(
            f"--model: {model} lacks transformer/config.json, which says whether it takes a last frame: {error}"
        ) from error
    return config.get("pos_embed_seq_len") is not None


@torch.no_grad()
def encode(
    pipe: WanPipeline | WanImageToVideoPipeline,
    frames: torch.Tensor,
    caption: str,
    dtype: torch.dtype,
    variants: Sequence[str] = (),
    last_frame: bool = False,
) -> dict[str, torch.Tensor]:
    """The tensors of one clip, as at the top of this file, in `dtype` on the CPU.

    Args:
        pipe: the result of `load_pipeline`.
        frames: uint8 [frames, height, width, 3], of a size that the pipeline can make.
        caption: a description of the frames.
        dtype: dtype of the result; latents are computed in float32.
        variants: other captions.
        last_frame: image to video is conditioned on the last frame too.
    """
    vae, device = pipe.vae, pipe.vae.device
    video = pipe.video_processor.normalize(frames.to(device).permute(3, 0, 1, 2)[None] / 255)
    # The mean, not a sample: Wan's own VAE returns nothing else, image to video is conditioned on it, and it is the same in
    # every run. Normalized as by WanImageToVideoPipeline.prepare_latents; the inverse is in WanPipeline.__call__.
    mean, std = (torch.tensor(x, device=device).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    latents = (vae.encode(video).latent_dist.mode() - mean) * (1.0 / std)
    tensors = {"latents": latents[0], "prompt_embeds": encode_text(pipe, caption)}
    tensors |= {f"prompt_embeds.{number}": encode_text(pipe, text) for number, text in enumerate(variants, 1)}
    if isinstance(pipe, WanImageToVideoPipeline):
        size, last = (*video.shape[3:], len(frames)), video[:, :, -1] if last_frame else None
        # With latents given, it draws no noise.
        _, condition = pipe.prepare_latents(
            video[:, :, 0], 1, latents.shape[1], *size, torch.float32, device, latents=latents, last_image=last
        )
        tensors["condition"] = condition[0]
        if pipe.image_encoder is not None:
            embeds = pipe.encode_image([frames[number].numpy() for number in ((0, -1) if last_frame else (0,))], device)
            tensors["image_embeds"] = embeds if last_frame else embeds[0]
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def encode_text(pipe: WanPipeline | WanImageToVideoPipeline, text: str) -> torch.Tensor:
    """The embeddings of a caption, [tokens, D], without the padding zeros."""
    prompt_embeds, _ = pipe.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=TEXT_LENGTH)
    rows = prompt_embeds[0].any(-1).nonzero()
    return prompt_embeds[0, : int(rows.max()) + 1 if len(rows) else 0]


def fingerprint(module: torch.nn.Module, *constants: Any) -> str:
    """A digest of the names, shapes and first values of all weights: quick, and different for differently trained weights."""
    digest = hashlib.sha256(json.dumps(constants).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _encode_all(args: argparse.Namespace, clips: list[Clip], skipped: dict[str, str]) -> None:
    """Encode the missing clips, then write the index of all clips, and report."""
    pipe = load_pipeline(args.model, getattr(torch, args.dtype), args.device)
    settings = _settings(args, pipe)
    with lock.locked(args.output, "--output"):
        _encode_into(args, pipe, settings, clips, skipped)


def _encode_into(
    args: argparse.Namespace,
    pipe: WanPipeline | WanImageToVideoPipeline,
    settings: dict[str, Any],
    clips: list[Clip],
    skipped: dict[str, str],
) -> None:
    """`_encode_all` inside the lock of the output folder."""
    for leftover in args.output.rglob(f"*{ASIDE}"):
        leftover.unlink()
    if isinstance(pipe, WanImageToVideoPipeline):
        reason = "it is an image, and image to video has nothing to learn from one"
        skipped |= {clip.source: reason for clip in clips if clip.is_image}
        clips = [clip for clip in clips if not clip.is_image]
    done = {clip: finished(args.output, clip, settings, args.windows) for clip in clips}
    pending = [clip for clip in clips if done[clip] is None]
    how = {"num_frames": args.num_frames, "resolutions": args.resolutions, "fps": args.fps, "windows": args.windows}
    data = Frames(args.input, pending, **how)
    loader = DataLoader(data, batch_size=None, num_workers=min(args.workers, len(pending)))
    bar = tqdm(loader, desc="Encoding", unit="clip", initial=len(clips) - len(pending), total=len(clips))
    for clip, (windows, reason) in zip(pending, bar, strict=True):
        if windows is None:
            skipped[clip.source] = reason
            continue
        done[clip] = _encode_windows(args, pipe, settings, clip, windows)

    for source, reason in sorted(skipped.items()):
        print(f"left out: {source}: {reason}")
    found = [one for entries in done.values() for one in entries or ()]
    entries = [{name: value for name, value in one.items() if name != "offered"} for one in found]
    if not entries:
        raise ValueError(f"--input: none of the {len(skipped)} clips in {args.input} can be used; the reasons are above")
    # Always encoded again: the file that is there may come from another text encoder.
    _write(args.output / EMPTY_CAPTION, {"prompt_embeds": encode_text(pipe, "").to("cpu", getattr(torch, args.dtype))}, None)
    write_index(args.output, settings, entries, skipped, empty_caption=True)
    _summarize(args.output, entries, len(skipped))


def _encode_windows(
    args: argparse.Namespace,
    pipe: WanPipeline | WanImageToVideoPipeline,
    settings: dict[str, Any],
    clip: Clip,
    windows: Windows,
) -> list[dict[str, Any]]:
    """Encode the missing windows of a clip; returns the entries of all its windows."""
    entries = []
    for number, start in enumerate(windows.starts):
        record, there = record_of(clip, windows, number, args.fps), entry(args.output, clip, start, settings)
        if there is None or any(there[name] != record[name] for name in ("frames", "height", "width")):
            how = getattr(torch, args.dtype), clip.variants, settings.get("last_frame", False)
            tensors = encode(pipe, windows.frames[number], clip.caption, *how)
            _write(file_of(args.output, clip, start), tensors, {"clip": json.dumps(record | {"settings": settings})})
            there = entry(args.output, clip, start, settings)
        if there is not None:
            entries.append(there)
    return entries


def _write(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    """Write a file completely or not at all. The header has one entry, because safetensors writes several in any order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        save_file({name: x.contiguous() for name, x in tensors.items()}, aside, metadata)


def _settings(args: argparse.Namespace, pipe: WanPipeline | WanImageToVideoPipeline) -> dict[str, Any]:
    """The settings that all clips of a folder share. Raises a ValueError if they do not fit the pipeline."""
    temporal = pipe.vae_scale_factor_temporal
    for number in args.num_frames:
        if number < 1 or number % temporal != 1:
            raise ValueError(f"--num-frames: expected a multiple of {temporal} plus 1, got {number}")
    # Wan's transformers take patches of 2 x 2 latents.
    multiple = 2 * pipe.vae_scale_factor_spatial
    for height, width in args.resolutions:
        if not height or not width or height % multiple or width % multiple:
            raise ValueError(f"--resolutions: expected multiples of {multiple}, got {height}x{width}")
    encoders = {"vae": fingerprint(pipe.vae, pipe.vae.config.latents_mean, pipe.vae.config.latents_std)}
    for name in ("text_encoder", "image_encoder"):
        if getattr(pipe, name, None) is not None:
            encoders[name] = fingerprint(getattr(pipe, name))
    # Wan 2.1 FLF2V has the pipeline of image to video, and a transformer with positions for two images.
    last_frame = getattr(pipe, "image_encoder", None) is not None and takes_last_frame(args.model)
    return {
        "pipeline": type(pipe).__name__,
        **({"last_frame": True} if last_frame else {}),
        **encoders,
        "text_length": TEXT_LENGTH,
        "num_frames": sorted(args.num_frames),
        "resolutions": [list(size) for size in args.resolutions],
        "fps": args.fps,
        "dtype": args.dtype,
    }


def _summarize(output: Path, entries: list[dict[str, Any]], skipped: int) -> None:
    sources = len({entry["source"] for entry in entries})
    windows = f" in {len(entries)} windows" if len(entries) != sources else ""
    print(f"{output / INDEX}: {sources} clips{windows}; {skipped} left out")
    sizes = Counter((entry["frames"], entry["height"], entry["width"]) for entry in entries)
    for (frames, height, width), count in sorted(sizes.items()):
        print(f"  {count} of {frames} frames, {height}x{width}")
    if full := sum(entry["shapes"]["prompt_embeds"][0] == TEXT_LENGTH for entry in entries):
        print(f"  {full} captions fill all {TEXT_LENGTH} tokens; what is longer was cut")
    if others := len({*(output / "clips").rglob("*.safetensors")} - {output / entry["file"] for entry in entries}):
        print(f"  {others} older files are not of clips in this input; the index leaves them out")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qat-patch prepare-wan-data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    # argparse prints this function's name when a value is wrong.
    def resolution(text: str) -> tuple[int, int]:
        height, width = text.split("x")
        return int(height), int(width)

    def option(name: str, help: str, **kind: Any) -> None:
        default = kind.get("default")
        if isinstance(default, list):
            default = " ".join("x".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in default)
        parser.add_argument(name, help=help + (f" (default: {default})" if default is not None else ""), **kind)

    option("--model", "folder or Hub name of a Wan pipeline in Diffusers' format", required=True)
    option("--input", "folder of videos and images with captions", required=True, type=Path)
    option("--output", "folder for the index and the tensors", required=True, type=Path)
    option("--num-frames", "allowed lengths, each a multiple of 4 plus 1", nargs="+", type=int, default=[81])
    sizes = {"nargs": "+", "type": resolution, "default": [(480, 832), (832, 480)], "metavar": "HEIGHTxWIDTH"}
    option("--resolutions", "allowed sizes, such as 480x832", **sizes)
    option("--fps", "frames a second that videos are resampled to; Wan was trained at 16", type=float, default=16.0)
    option("--windows", "clips from each video, spread evenly from its start to its end; 1: the start", type=int, default=1)
    option("--dtype", "dtype of the stored tensors and of the text encoder", choices=["bfloat16", "float32"], default="bfloat16")
    option("--device", "device of the encoders", default="cuda" if torch.cuda.is_available() else "cpu")
    option("--workers", "processes that decode videos in advance; 0: decode when needed", type=int, default=2)
    return parser.parse_args(arguments)
