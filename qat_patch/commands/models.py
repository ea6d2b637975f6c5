"""Load what commands measure: any model, pipeline or export, and its text."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch

from qat_patch.checkpoint.load import check_tokenizer, load_checkpoint, load_tokenizer
from qat_patch.checkpoint.trust.download import holds_export, is_folder
from qat_patch.checkpoint.trust.file_names import MANIFEST
from qat_patch.checkpoint.trust.plain_json import read_json
from qat_patch.config import AttnQATConfig
from qat_patch.metadata import LOADING_ADAPTERS


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name the model and its device."""
    parser.add_argument("model", help="a model, a pipeline or an export: a folder, or a name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored; for diffusers float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report to this file")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how much of a text to read."""
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="with --text: how many rows (default: 4)")
    parser.add_argument("--tokens", type=int, default=1024, metavar="N", help="with --text: tokens in a row (default: 1024)")


def add_image_arguments(parser: Any) -> None:
    """Add the options that name the images a pipeline starts from."""
    parser.add_argument("--image", type=Path, metavar="FILE", help="the first frame, for video from an image")
    parser.add_argument("--last-image", type=Path, metavar="FILE", help="the last frame, for pipelines that take one")


def with_images(pipe: Any, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The pipeline for the images that the options name, and its arguments. TI2V 5B of Wan 2.2 is a model for both pipelines.

    Raises:
        ValueError: an image is missing, or the pipeline takes none.
    """
    files = {name: getattr(options, name) for name in ("image", "last_image") if getattr(options, name) is not None}
    if "image" in files and type(pipe).__name__ == "WanPipeline" and pipe.config.expand_timesteps:
        from diffusers import WanImageToVideoPipeline

        pipe = WanImageToVideoPipeline(**pipe.components, expand_timesteps=True)
    taken, name_of = inspect.signature(type(pipe).__call__).parameters, type(pipe).__name__
    needed = {name for name in ("image",) if name in taken and taken[name].default is inspect.Parameter.empty}
    if getattr(getattr(getattr(pipe, "transformer", None), "config", None), "pos_embed_seq_len", None) is not None:
        needed.add("last_image")  # FLF2V of Wan 2.1
    for name in ("image", "last_image"):
        option = f"--{name.replace('_', '-')}"
        if name in files and name not in taken:
            raise ValueError(f"{option}: has no effect: a {name_of} takes none; leave it out")
        if name in needed and name not in files:
            raise ValueError(f"{option}: expected an image file, because this {name_of} makes video from it, got none")
        if name in files and not files[name].is_file():
            raise ValueError(f"{option}: there is no file {files[name]}")
    if not files:
        return pipe, {}
    from diffusers.utils import load_image

    return pipe, {name: load_image(str(file)) for name, file in files.items()}


def is_export(options: argparse.Namespace) -> bool:
    """Whether the model is an export of this package: a folder that `export_checkpoint` wrote, or one on the Hub.

    A folder with the exports of several transformers of a pipeline counts too.
    """
    if transformers_in(Path(options.model)):
        return True
    if not holds_export(options.model, options.revision):
        return False
    # save_pretrained of a patched model writes a file of that name too, but no export.
    return not is_folder(options.model, options.revision) or "kind" in read_json(Path(options.model, MANIFEST))


def transformers_in(folder: Path) -> list[Path]:
    """The exports of transformers in a folder that is no export itself: a run with `model.transformer=both` writes two."""
    if (folder / MANIFEST).exists():
        return []
    return [folder / name for name in LOADING_ADAPTERS if (folder / name / MANIFEST).is_file()]


def load_model(options: argparse.Namespace) -> Any:
    """The model on its device, in evaluation mode. An export is patched, anything else is not.

    Raises:
        ValueError: there is none.
    """
    dtype = "auto" if options.dtype is None else getattr(torch, options.dtype)
    if is_export(options):
        return load_checkpoint(options.model, revision=options.revision, dtype=dtype, device=options.device)
    local = is_folder(options.model, options.revision)
    of_hub = {"local_files_only": local} | ({} if options.revision is None else {"revision": options.revision})
    for_diffusers = of_hub | ({} if dtype == "auto" else {"dtype": dtype})
    kind = _kind(options)
    if kind == "pipeline":
        from diffusers import DiffusionPipeline

        pipe = DiffusionPipeline.from_pretrained(options.model, **for_diffusers).to(options.device)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    if kind == "diffusers":
        from diffusers import AutoModel

        return AutoModel.from_pretrained(options.model, **for_diffusers).eval().to(options.device)
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype, **of_hub).eval().to(options.device)


def _kind(options: argparse.Namespace) -> str:
    """`pipeline`, `diffusers` for a model of it, or `transformers`.

    Raises:
        ValueError: there is no model.
    """
    model = options.model
    if not is_folder(model, options.revision):
        from huggingface_hub import file_exists

        return "pipeline" if file_exists(model, "model_index.json", revision=options.revision) else "transformers"
    if Path(model, "model_index.json").is_file():
        return "pipeline"
    if not Path(model, "config.json").is_file():
        raise ValueError(f"{model}: expected the folder of a model or a pipeline, got no config.json or model_index.json there")
    return "diffusers" if "_class_name" in read_json(Path(model, "config.json")) else "transformers"


def load_tokenizer_of(options: argparse.Namespace) -> Any:
    """The tokenizer beside a language model."""
    if is_export(options):
        return load_tokenizer(options.model, revision=options.revision)
    from transformers import AutoTokenizer

    local = is_folder(options.model, options.revision)
    if local:
        check_tokenizer(options.model)
    revision = {} if options.revision is None else {"revision": options.revision}
    return AutoTokenizer.from_pretrained(options.model, local_files_only=local, **revision)


def text_rows(options: argparse.Namespace) -> list[torch.Tensor]:
    """`--batches` rows of `--tokens` token ids of `--text`: int64 [1, tokens], on the device.

    Raises:
        ValueError: there is less text.
    """
    if not options.text.is_file():
        raise ValueError(f"--text: there is no file {options.text}")
    for name, least in (("batches", 1), ("tokens", 2)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if not is_export(options):
        _kind(options)
    tokenizer = load_tokenizer_of(options)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0].to(options.device)
    if len(ids) < options.tokens:
        raise ValueError(
            f"--tokens: expected at least {options.tokens} tokens in {options.text}, got {len(ids)}; take a longer text, or a "
            "smaller number"
        )
    return [*ids[: len(ids) // options.tokens * options.tokens].view(-1, 1, options.tokens)[: options.batches]]


def config_of(options: argparse.Namespace) -> AttnQATConfig | None:
    """The config in `--config`, or None."""
    return None if options.config is None else AttnQATConfig.from_json(options.config.read_text(encoding="utf-8"))
