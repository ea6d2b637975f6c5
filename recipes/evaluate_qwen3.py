"""Held-out losses of an exported language model in both kinds of attention, measured as in its run. The last line is JSON.

Measures packed blocks, and runs on several processes as training does (accelerate launch). What each preset would cost a model:
`qat-patch evaluate`.

python recipes/evaluate_qwen3.py model=outputs/run/export text.path=held_out.txt sequence_length=256
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import cast

from accelerate import Accelerator
from torch.utils.data import DataLoader

from qat_patch import PatchHandle, get_handle, load_checkpoint
from qat_patch.checkpoint.load import load_tokenizer
from qat_recipes.command_line import read_settings, run
from qat_recipes.data.documents import TextSource
from qat_recipes.data.text import check_vocabulary, load_source
from qat_recipes.tasks.language_modeling import NextToken
from qat_recipes.training.objective import evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure an exported language model on held-out text."""

    model: str
    """Folder that export_checkpoint wrote, or its name on the Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; null: main."""
    text: TextSource
    """The text to measure on."""
    sequence_length: int
    """Tokens per block."""
    batch_size: int = 1
    """Blocks per forward pass."""

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"settings.{name}: expected at least {least}, got {getattr(self, name)}")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measure as the command line says. Prints and returns the losses."""
    settings = read_settings(Settings, arguments)
    accelerator = Accelerator()
    model = load_checkpoint(settings.model, revision=settings.revision, device=accelerator.device)
    tokenizer = load_tokenizer(settings.model, revision=settings.revision)
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    blocks = load_source(settings.text, tokenizer, settings.sequence_length)
    loader = accelerator.prepare(DataLoader(blocks, settings.batch_size))
    handle = cast(PatchHandle, get_handle(model))  # exports are loaded patched
    losses = evaluate(NextToken(), model, handle, loader, accelerator)
    accelerator.print(json.dumps(losses))
    return losses


if __name__ == "__main__":
    run(main)
