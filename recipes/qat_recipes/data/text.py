"""Text as blocks of tokens: tokenized, packed and cut to one length."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch.utils.data import Sampler

from .documents import TextSource, load_documents
from .generated import GenerateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS_A_BATCH = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Training text, held-out text, and the length of the blocks they are cut into."""

    train: TextSource | None = None
    """Texts to train on. Set either this or `generate`."""
    generate: GenerateSettings | None = None
    """Without data: the starting model writes the text to train on. With distillation=1 it learns to give the same output in
    4-bit attention as in its own."""
    eval: TextSource | None = None
    """Held-out texts. Set this, `eval_fraction`, or neither."""
    eval_fraction: float | None = None
    """Hold out this fraction of the training blocks: the last ones in the order of the texts."""
    sequence_length: int
    """Tokens per block. Documents, each with an end-of-text token, are packed one after another and never see each other. The
    end of a block cuts a document; its rest starts the next block as a new document."""

    streaming: int | None = None
    """Stream the training text, and shuffle within windows of this many blocks; null: read all of it first."""
    chat: bool = False
    """Supervised fine-tuning: rows are conversations (a column `messages`), and only the last answer is learned."""

    def __post_init__(self) -> None:
        if (self.train is None) == (self.generate is None):
            raise ValueError(
                "data: expected either train, texts to train on, or generate, for text that the model writes itself, got "
                + ("neither" if self.train is None else "both")
            )
        if self.generate is not None and (self.streaming is not None or self.chat):
            raise ValueError("data.generate: the model writes plain text, before the run; leave out streaming and chat")
        if self.streaming is not None and (self.streaming < 1 or self.chat or self.eval_fraction is not None):
            raise ValueError(
                "data.streaming: expected a number of blocks from 1 up, without chat and eval_fraction, got "
                f"{self.streaming}, chat={self.chat}, eval_fraction={self.eval_fraction}"
            )
        if self.sequence_length < 2:
            raise ValueError(f"data.sequence_length: expected at least 2, got {self.sequence_length}")
        if self.eval is not None and self.eval_fraction is not None:
            raise ValueError("data: eval and eval_fraction are both set; leave one out")
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"data.eval_fraction: expected a number between 0 and 1, got {self.eval_fraction}")
        if self.generate is not None:
            self.generate.check_length(self.sequence_length)
        if self.eval is not None and self.train is not None and self.eval.same_text_as(self.train):
            raise ValueError(f"data.eval: {self.train.path} is the training text too; hold out other text")

    @property
    def has_eval(self) -> bool:
        """Whether there is held-out text."""
        return self.eval is not None or self.eval_fraction is not None


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices, shuffled again in every epoch, from batch number `start` of the run to `stop`.

    The order depends only on the seed, so that a resumed run continues exactly where the other one stopped. Samples
    that do not fill a batch are skipped in that epoch.

    Raises:
        ValueError: there are not enough samples for one batch.
    """

    drop_last = True

    def __init__(self, samples: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        if samples < batch_size:
            raise ValueError(f"there are {samples} samples to train on, and batch_size is {batch_size}; give more data")
        self.samples, self.batch_size, self.seed, self.start, self.stop = samples, batch_size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order: list[int] = []
        for number in range(self.start, self.stop):
            epoch, position = divmod(number, self.samples // self.batch_size)
            if position == 0 or not order:
                order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.seed + epoch)).tolist()
            yield order[position * self.batch_size : (position + 1) * self.batch_size]


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Raise a ValueError if a tokenizer gives tokens that are not in a vocabulary of this size."""
    token, number = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if number >= size:
        raise ValueError(
            f"model.path: expected a tokenizer for a vocabulary of {size} tokens, got one with {len(tokenizer)}: {token!r} has "
            f"the number {number}; take the tokenizer that the model was made with, or resize the model's embeddings"
        )


def fingerprint_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of everything that decides which tokens a text gives."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    content = [backend, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint_of_blocks(blocks: datasets.Dataset) -> str:
    """A digest of blocks: of every token, in order."""
    digest = hashlib.sha256()
    for table in blocks.with_format("arrow").iter(batch_size=1000):
        for name in sorted(table.column_names):
            digest.update(name.encode())
            for chunk in table[name].chunks:
                digest.update(chunk.flatten().to_numpy().data)
    return digest.hexdigest()


def load_blocks(
    settings: TextSettings,
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[..., datasets.Dataset],
    train: datasets.Dataset | None = None,
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Blocks to train on and held-out blocks (None if nothing is held out), loaded with `load`, such as `load_source`.

    Args:
        train: the blocks to train on and to hold out a fraction of; default: those of `settings.train`.

    Raises:
        ValueError: a text cannot be read, or is not enough for one block.
    """
    if train is None:
        train = load(settings.train, tokenizer, settings.sequence_length)
    if settings.eval is not None:
        return train, load(settings.eval, tokenizer, settings.sequence_length)
    if settings.eval_fraction is None:
        return train, None
    held_out = max(1, round(len(train) * settings.eval_fraction))
    if held_out >= len(train):
        raise ValueError(
            f"data.eval_fraction: {settings.eval_fraction} of {len(train)} blocks of {settings.sequence_length} tokens leaves "
            "none to train on; give more text or shorter blocks"
        )
    first = len(train) - held_out
    return train.select(range(first)), train.select(range(first, len(train)))


def load_source(source: TextSource, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> datasets.Dataset:
    """The blocks of one source: rows of `input_ids` and `position_ids`, both int64 [sequence_length].

    Documents are packed one after another, with an end-of-text token after each, and cut into blocks without padding.
    `position_ids` start at 0 with every document and with every block: this tells models and `NextToken` which tokens may attend
    to each other. So the end of a block cuts a document, and its rest is a new document; a very long one becomes a first piece,
    whole blocks, and a last piece that others follow. The rest of each 10,000 documents after their last whole block is dropped.

    Raises:
        ValueError: as for `load_documents`; or the tokenizer has no end-of-text token, or the text does not fill one block.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), which goes between documents; set one")

    def tokens(batch: dict[str, list[Any]]) -> list[list[int]]:
        return [[*ids, end] for ids in tokenizer(batch["text"], verbose=False)["input_ids"]]

    documents = load_documents(source)
    blocks = _blocks(documents, "text", tokens, sequence_length, f"Tokenizing {source.path}")
    if len(blocks) == 0:
        raise ValueError(
            f"{source.path}: {len(documents)} document(s) that do not fill one block of {sequence_length} tokens; "
            "give more text or a smaller data.sequence_length"
        )
    if source.blocks is not None:
        blocks = blocks.select(range(min(source.blocks, len(blocks))))
    return blocks.with_format("torch")


def pack_sequences(sequences: datasets.Dataset, sequence_length: int) -> datasets.Dataset:
    """The same for rows of `tokens`, each of which is one document: no end-of-text token is added.

    Raises:
        ValueError: they do not fill one block.
    """
    blocks = _blocks(sequences, "tokens", lambda batch: batch["tokens"], sequence_length, "Packing")
    if len(blocks) == 0:
        raise ValueError(
            f"data.generate: {len(sequences)} sequence(s) that do not fill one block of {sequence_length} tokens; let the model "
            "write more (data.generate.sequences), or choose a smaller data.sequence_length"
        )
    return blocks.with_format("torch")


def _blocks(
    rows: datasets.Dataset, column: str, tokens_of: Callable[[Any], list[list[int]]], sequence_length: int, description: str
) -> datasets.Dataset:
    """Documents packed one after another and cut into blocks. `tokens_of` gives the tokens of a batch of rows of `column`."""

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        documents = tokens_of(batch)
        tokens = [token for document in documents for token in document]
        borders = {*accumulate(len(document) for document in documents), *range(0, len(tokens), sequence_length)}
        positions: list[int] = []
        for index in range(len(tokens)):
            positions.append(0 if index in borders else positions[-1] + 1)
        blocks = [slice(start, start + sequence_length) for start in range(0, len(tokens) - sequence_length + 1, sequence_length)]
        return {"input_ids": [tokens[block] for block in blocks], "position_ids": [positions[block] for block in blocks]}

    return rows.map(
        cut,
        batched=True,
        batch_size=_DOCUMENTS_A_BATCH,
        remove_columns=column,
        features=datasets.Features(dict.fromkeys(("input_ids", "position_ids"), datasets.List(datasets.Value("int32")))),
        desc=description,
    )
