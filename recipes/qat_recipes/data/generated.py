"""Text that the starting model writes itself, for runs without data: sampled in batches before the first step, and stored.

Each batch has its own seed and its own file, so that a killed run continues with the next batch, and any number of processes
write the same text. (LLM-QAT, arXiv 2305.17888, trains on such text.)
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import disable_fsdp_ram_efficient_loading, enable_fsdp_ram_efficient_loading
from tqdm.auto import tqdm
from transformers import GenerationConfig

from qat_patch import get_handle
from qat_patch.checkpoint import integrity

from .documents import TextSource, load_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ORIGIN = "origin.json"
"""Everything that the text depends on, with a hash; written before the first batch."""
_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How the starting model writes its own training text, before the first step, into output_dir/generated."""

    sequences: int
    """The number of sequences to write."""
    length: int | None = None
    """Maximum tokens of a sequence, including its prompt. null: data.sequence_length."""
    attention: Literal["original", "fp4"] = "original"
    """The attention to write with: the model's own, or 4-bit attention (`qat`, before any training) with the FP4 cache."""
    temperature: float = 1.0
    """The logits are divided by this before a token is sampled."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together have this probability; 1: among all."""
    seed: int = 0
    """Seed of the sampling. The order of the text in training follows from the run's own seed."""
    batch_size: int = 32
    """Sequences that one process writes at once."""
    prompts: TextSource | None = None
    """Documents whose beginnings are the prompts, in order, then again from the first. null: each sequence begins with the
    beginning-of-text token (or the end-of-text token, if the tokenizer has no other), and the model writes freely."""
    prompt_length: int = 32
    """Tokens of each document that form the prompt."""

    def __post_init__(self) -> None:
        for name in ("sequences", "batch_size", "prompt_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.generate.{name}: expected at least 1, got {getattr(self, name)}")
        if self.length is not None and self.length < 2:
            raise ValueError(f"data.generate.length: expected at least 2, or null, got {self.length}")
        if not self.temperature > 0:
            raise ValueError(f"data.generate.temperature: expected a positive number, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"data.generate.top_p: expected a number above 0 and at most 1, got {self.top_p}")
        if self.seed < 0:
            raise ValueError(f"data.generate.seed: expected 0 or more, got {self.seed}")
        if self.prompts is None and self.prompt_length != 32:
            raise ValueError(f"data.generate.prompt_length: expected no number without prompts, got {self.prompt_length}")
        if self.prompts is not None and self.prompts.blocks is not None:
            raise ValueError("data.generate.prompts.blocks: prompts are documents, not blocks; set it to null")

    def check_length(self, sequence_length: int) -> None:
        """Raise a ValueError if prompts leave nothing to write."""
        length = self.length or sequence_length
        if self.prompts is not None and self.prompt_length >= length:
            raise ValueError(
                f"data.generate.prompt_length: expected less than the length of a sequence ({length}), got {self.prompt_length}"
            )


def generated_text(
    settings: GenerateSettings,
    *,
    length: int,
    folder: Path,
    origin: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[[], torch.nn.Module],
    digest: Callable[[torch.nn.Module], str],
    accelerator: Accelerator,
) -> datasets.Dataset:
    """The sequences, as rows of `tokens` for `pack_sequences`. Those that are not in the folder yet are written now.

    All processes call this; each writes some of the batches. The random numbers of the training do not change.

    Args:
        length: maximum tokens of a sequence.
        folder: the folder for this text only.
        origin: plain values that the text depends on, besides the settings and the weights.
        load: gives the model in evaluation mode, patched if it is to write with 4-bit attention; called if there is anything to
            write.
        digest: computes the digest of a model's weights.

    Raises:
        ValueError: the folder holds text of another model or with other settings, or its files have changed; the tokenizer has
            no token to begin with; or the prompts cannot be read.
    """
    files = [folder / f"batch-{number:06d}.json" for number in range(math.ceil(settings.sequences / settings.batch_size))]
    prompts = _prompts(settings, tokenizer)
    prompts_digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    chosen = dataclasses.asdict(settings) | {"length": length, "prompts": prompts_digest}
    origin = {"format_version": _FORMAT_VERSION} | origin | {f"data.generate.{name}": value for name, value in chosen.items()}
    # Before any process writes, so that all decide alike.
    is_whole = all(file.is_file() for file in files)
    accelerator.wait_for_everyone()
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    if is_whole:
        _check_origin(folder, origin)
    else:
        with torch.random.fork_rng(devices):
            model = _load_whole(load)
            origin["the weights of model.path"] = digest(model)
            if accelerator.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / _ORIGIN).exists():
                    _write(folder / _ORIGIN, origin)
            accelerator.wait_for_everyone()
            _check_origin(folder, origin)
            writer = _Writer(settings, length, tokenizer, model.to(accelerator.device), prompts)
            mine = range(accelerator.process_index, len(files), accelerator.num_processes)
            missing = [number for number in mine if not files[number].is_file()]
            for number in tqdm(missing, "Writing text to train on", disable=not accelerator.is_local_main_process):
                writer.write(number, files[number])
            del writer, model
        if devices:
            torch.cuda.empty_cache()
        accelerator.wait_for_everyone()
    if missing_files := [file for file in files if not file.is_file()]:
        raise ValueError(
            f"data.generate: {missing_files[0]} is missing, which another process has written: expected an output_dir that all "
            "processes share"
        )
    names = [str(file) for file in files]
    # The key of the datasets cache is the content of the files.
    arguments = {"files": names, "sha256": [integrity.sha256(file) for file in files]}
    features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"))})
    try:
        return datasets.Dataset.from_generator(_rows, gen_kwargs=arguments, features=features)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


class _Writer:
    """Samples batches of sequences."""

    def __init__(
        self,
        settings: GenerateSettings,
        length: int,
        tokenizer: PreTrainedTokenizerBase,
        model: Any,
        prompts: list[list[int]],
    ) -> None:
        self.settings, self.tokenizer, self.model, self.prompts = settings, tokenizer, model, prompts
        ends = model.generation_config.eos_token_id
        self.ends = sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        self.length, self.pad = length, self.ends[0]
        # The model's own config would add options that the settings do not name, such as top_k.
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            eos_token_id=self.ends,
            pad_token_id=self.pad,
        )

    def write(self, number: int, file: Path) -> None:
        """Sample a batch and write it to its file."""
        settings, size = self.settings, self.settings.batch_size
        which = range(number * size, min((number + 1) * size, settings.sequences))
        prompts = [self.prompts[index % len(self.prompts)] for index in which]
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        ids = torch.tensor([[self.pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        seed = hashlib.sha256(f"{settings.seed} {number}".encode()).digest()
        torch.manual_seed(int.from_bytes(seed[:8], "big") >> 1)
        handle = get_handle(self.model)
        options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": self.length - width}
        if handle is None:
            out = self.model.generate(**options)
        else:
            with handle.cached():
                out = self.model.generate(**options)
        written = [prompt + self._until_the_end(row) for prompt, row in zip(prompts, out[:, width:].tolist(), strict=True)]
        text = [self.tokenizer.decode(tokens) for tokens in written]
        _write(file, {"tokens": written, "text": text})

    def _until_the_end(self, tokens: list[int]) -> list[int]:
        stop = next((index for index, token in enumerate(tokens) if token in self.ends), len(tokens))
        return tokens[: stop + 1]


def _prompts(settings: GenerateSettings, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The prompts of the sequences, used in turn."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), at which a sequence ends; set one")
    if settings.prompts is None:
        return [[tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]]
    first = min(settings.sequences, settings.prompts.documents or settings.sequences)
    documents = load_documents(dataclasses.replace(settings.prompts, documents=first))
    return [ids[: settings.prompt_length] for ids in tokenizer(documents["text"][:], verbose=False)["input_ids"]]


def _load_whole(load: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Load the whole model in each process, even if the training shards it."""
    shards = os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "False").lower() == "true"
    if not shards:
        return load()
    disable_fsdp_ram_efficient_loading()
    try:
        return load()
    finally:
        enable_fsdp_ram_efficient_loading()


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Raise a ValueError if the folder holds another text than the requested one."""
    kept = _read(folder / _ORIGIN)
    changed = [f"{name} was {kept.get(name)!r} and is {value!r}" for name, value in origin.items() if kept.get(name) != value]
    if changed:
        raise ValueError(
            f"data.generate: {folder} holds text that was written differently: {'; '.join(changed)}. Set these as they were, "
            "remove the folder, or choose another output_dir"
        )


def _write(file: Path, content: dict[str, Any]) -> None:
    """Write a file completely or not at all."""
    aside = file.with_name(f"{file.name}.incomplete")
    aside.write_text(json.dumps(integrity.sealed(content), ensure_ascii=False), encoding="utf-8")
    integrity.sync(aside, recursive=False)
    aside.replace(file)
    integrity.sync(file.parent, recursive=False)


def _read(file: Path) -> dict[str, Any]:
    try:
        return integrity.unsealed(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"data.generate: {file} cannot be used ({error}); remove it, and the run writes it again") from error


def _rows(files: list[str], sha256: list[str]) -> Iterator[dict[str, list[int]]]:
    for file in files:
        for tokens in _read(Path(file))["tokens"]:
            yield {"tokens": tokens}
