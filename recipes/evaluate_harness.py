"""Tasks of EleutherAI's lm-evaluation-harness on a language model, with original and with 4-bit attention side by side.

python recipes/evaluate_harness.py model=outputs/run/export tasks=[hellaswag,arc_easy] batch_size=8
python recipes/evaluate_harness.py model=Qwen/Qwen3-0.6B tasks=[hellaswag] qat.exclude=['*.0.*']

Needs `pip install lm-eval`. The tasks it comes with download their data from the Hub; tasks of your own (include_path) need not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qat_patch import AttnQATConfig, PatchHandle, get_handle, load_checkpoint, patch_model
from qat_patch.checkpoint.load import load_tokenizer
from qat_patch.checkpoint.trust.download import holds_export
from qat_patch.measure.harness import Attention, run_tasks
from qat_recipes.command_line import read_settings
from qat_recipes.data.text import check_vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Evaluate a language model with lm-evaluation-harness, in both kinds of attention."""

    model: str
    """Folder that export_checkpoint wrote, or any model that qat_patch can patch: a folder, or a name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null: main."""
    qat: AttnQATConfig | None = None
    """What is patched and what is quantized, of a model that is no export; null: all in NVFP4."""
    tasks: tuple[str, ...]
    """Names of tasks."""
    include_path: str | None = None
    """A folder with tasks of your own."""
    attention: tuple[Literal["original", "fp4"], ...] = ("original", "fp4")
    """What to measure."""
    num_fewshot: int | None = None
    """Examples in the prompt; null: as the task says."""
    limit: int | None = None
    """Only the first so many documents of a task, for a quick look; null: all."""
    batch_size: int = 1
    """Sequences in a forward pass."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the weights; auto: as stored."""
    seed: int = 0
    """Of all that is drawn."""
    output: str | None = None
    """A new file for the results as JSON; they are printed either way."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("settings.tasks: expected names of tasks, got none")
        if not self.attention or len(set(self.attention)) < len(self.attention):
            raise ValueError(f"settings.attention: expected original, fp4 or both, got {list(self.attention)}")
        for name in ("limit", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"settings.{name}: expected at least 1, got {getattr(self, name)}")
        if self.output is not None and Path(self.output).exists():
            raise ValueError(f"settings.output: {self.output} exists; choose another file")


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate as the command line says; prints and returns the results by kind of attention and task.

    Raises:
        ValueError: settings that do not fit, lm-eval is not installed, or it does not know a task.
    """
    settings = read_settings(Settings, arguments)

    def load() -> tuple[torch.nn.Module, Any, dict[str, Attention]]:
        model, handle = _load(settings)
        if holds_export(settings.model, settings.revision):
            tokenizer = load_tokenizer(settings.model, revision=settings.revision)
        else:
            tokenizer = AutoTokenizer.from_pretrained(settings.model, **_revision(settings))
        check_vocabulary(tokenizer, cast(Any, model).get_input_embeddings().num_embeddings)
        attentions: dict[str, Attention] = {"original": handle.disabled, "fp4": contextlib.nullcontext}
        return model, tokenizer, {name: attentions[name] for name in settings.attention}

    results = run_tasks(
        load,
        settings.tasks,
        include_path=settings.include_path,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    text = json.dumps(results, indent=1)
    if settings.output is not None:
        Path(settings.output).write_text(text + "\n", encoding="utf-8")
    print(text)
    return results


def _revision(settings: Settings) -> dict[str, str]:
    return {} if settings.revision is None else {"revision": settings.revision}


def _load(settings: Settings) -> tuple[torch.nn.Module, PatchHandle]:
    """The model, patched."""
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if holds_export(settings.model, settings.revision):
        if settings.qat is not None:
            raise ValueError(f"settings.qat: {settings.model} is an export and says itself what is patched; leave it out")
        model = load_checkpoint(settings.model, revision=settings.revision, dtype=dtype, device=device)
        return model, cast(PatchHandle, get_handle(model))
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, **_revision(settings)).eval().to(device)
    return model, patch_model(model, settings.qat or AttnQATConfig())


if __name__ == "__main__":
    main()
