"""Text as blocks of tokens: from the Hub or from local files, tokenized, packed and cut to one length."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch.utils.data import Sampler

from .json_lines import read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS_A_BATCH = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where texts come from."""

    path: str
    """A .txt or .jsonl file, a folder of .txt files (a file is one document), or the name of a dataset on the Hub."""
    config: str | None = None
    """Configuration of a Hub dataset, such as `en` of `allenai/c4`."""
    split: str | None = None
    """Split of a Hub dataset; default `train`."""
    text_column: str | None = None
    """The column of a Hub dataset or the key of a .jsonl file that holds the text; default `text`."""
    documents: int | None = None
    """Take at most the first so many documents; of a Hub dataset only these are downloaded."""
    blocks: int | None = None
    """Of what the documents are cut into, take at most the first so many blocks."""

    def __post_init__(self) -> None:
        for name in ("documents", "blocks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.is_local:
            return
        if not Path(self.path).exists():
            raise ValueError(f"path: there is no file or folder {self.path}")
        for name in ("config", "split"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: only datasets of the Hub have one, and {self.path} is local; leave it out")
        if Path(self.path).is_dir() or self.path.endswith(".txt"):
            if self.text_column is not None:
                raise ValueError(f"text_column: text files have no columns, and {self.path} is one or holds them; leave it out")
        elif not self.path.endswith(".jsonl"):
            raise ValueError(f"path: expected a .txt or .jsonl file, a folder or a Hub dataset, got {self.path}")

    def same_text_as(self, other: TextSource) -> bool:
        """Whether the texts overlap: both sources take the first ones of the same place."""
        return (self.path, self.config, self.split or "train") == (other.path, other.config, other.split or "train")

    @property
    def is_local(self) -> bool:
        """Whether `path` is a file or folder. What looks like a path is never looked up on the Hub."""
        return Path(self.path).exists() or self.path.endswith((".txt", ".jsonl")) or self.path.startswith((".", "/", "~"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Training text, held-out text, and the length of the blocks they are cut into."""

    train: TextSource
    """Texts to train on."""
    eval: TextSource | None = None
    """Held-out texts. Either this, or `eval_fraction`, or neither."""
    eval_fraction: float | None = None
    """Hold out this part of the training blocks, the last ones in the order of the texts."""
    sequence_length: int
    """Tokens in a block. Documents, each with an end-of-text token, are packed one after the other and never see each other; the
    end of a block cuts a document, and the rest of it starts anew in the next block."""

    streaming: int | None = None
    """Read the training text as it comes, and shuffle within windows of so many blocks; null: read all of it first."""
    chat: bool = False
    """Supervised fine-tuning: rows are conversations (a column `messages`), and the last answer is what is learned."""

    def __post_init__(self) -> None:
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
        if self.eval is not None and self.eval.same_text_as(self.train):
            raise ValueError(f"data.eval: {self.train.path} is the training text too; hold out other text")

    @property
    def has_eval(self) -> bool:
        """Whether there is held-out text."""
        return self.eval is not None or self.eval_fraction is not None


class ShuffledBatches(Sampler[list[int]]):
    """Batches of indices, shuffled anew in every epoch, from batch number `start` of the run to `stop`.

    The order follows from the seed alone, so that a resumed run goes on exactly where the other one stopped. Samples
    that do not fill a batch sit out one epoch.

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


def load_blocks(
    settings: TextSettings, tokenizer: PreTrainedTokenizerBase, load: Callable[..., datasets.Dataset]
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Blocks to train on and held-out blocks (None if nothing is held out), as `load` makes them: `load_source` or the like.

    Raises:
        ValueError: a text that cannot be read, or not enough text for one block.
    """
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

    Documents are packed one after the other, an end-of-text token after each, and the whole is cut into blocks without padding.
    `position_ids` start at 0 with every document and with every block: that is how models and `NextToken` know which tokens
    may attend to each other. So a document that goes on after the end of a block is cut there, and its rest is a document of its
    own; one of several times the length becomes a first piece, whole blocks, and a last piece that others follow. What is left of
    each 10,000 documents after their last whole block is dropped.

    Raises:
        ValueError: as `load_documents`; or the tokenizer has no end-of-text token, or the text does not fill one block.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), which goes between documents; set one")

    def cut(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        documents = [(*ids, end) for ids in tokenizer(batch["text"], verbose=False)["input_ids"]]
        tokens = [token for document in documents for token in document]
        borders = {*accumulate(len(document) for document in documents), *range(0, len(tokens), sequence_length)}
        positions: list[int] = []
        for index in range(len(tokens)):
            positions.append(0 if index in borders else positions[-1] + 1)
        blocks = [slice(start, start + sequence_length) for start in range(0, len(tokens) - sequence_length + 1, sequence_length)]
        return {"input_ids": [tokens[block] for block in blocks], "position_ids": [positions[block] for block in blocks]}

    documents = load_documents(source)
    blocks = documents.map(
        cut,
        batched=True,
        batch_size=_DOCUMENTS_A_BATCH,
        remove_columns="text",
        features=datasets.Features(dict.fromkeys(("input_ids", "position_ids"), datasets.List(datasets.Value("int32")))),
        desc=f"Tokenizing {source.path}",
    )
    if len(blocks) == 0:
        raise ValueError(
            f"{source.path}: {len(documents)} document(s) that do not fill one block of {sequence_length} tokens; "
            "give more text or a smaller data.sequence_length"
        )
    if source.blocks is not None:
        blocks = blocks.select(range(min(source.blocks, len(blocks))))
    return blocks.with_format("torch")


def load_documents(source: TextSource) -> datasets.Dataset:
    """The documents of a source: rows of `text`, blank ones left out.

    Raises:
        ValueError: a file that cannot be read, no such column, or a column that is not text.
    """
    column = source.text_column or "text"
    if not source.is_local:
        documents = _load_from_hub(source, column)
    elif source.path.endswith(".jsonl") and Path(source.path).is_file():
        try:
            documents = datasets.Dataset.from_json(source.path)
        # An empty file ends in a bare StopIteration, blank lines in a ValueError.
        except (datasets.exceptions.DatasetGenerationError, StopIteration, ValueError) as error:
            # Read again to say which line it is.
            deque(read_json_lines(Path(source.path), {}), maxlen=0)
            raise ValueError(f"{source.path}: expected JSON lines, got: {error.__cause__ or str(error) or 'nothing'}") from error
    else:
        documents = datasets.Dataset.from_dict({"text": _read_texts(Path(source.path))})
    if column not in documents.column_names:
        raise ValueError(
            f"{source.path}: there is no column {column!r}; set text_column to one of {', '.join(documents.column_names)}"
        )
    if getattr(documents.features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{source.path}: the column {column!r} is not text but {documents.features[column]}")
    documents = documents.select_columns(column).rename_columns({column: "text"})
    if source.documents is not None:
        documents = documents.select(range(min(source.documents, len(documents))))
    try:
        documents = documents.filter(_not_blank, input_columns="text")
    except UnicodeDecodeError:
        deque(read_json_lines(Path(source.path), {}), maxlen=0)
        raise
    if len(documents) == 0:
        raise ValueError(f"{source.path}: there is no text in it")
    return documents


def _not_blank(text: str | None) -> bool:
    return bool(text and text.strip())


def _load_from_hub(source: TextSource, column: str) -> datasets.Dataset:
    split = source.split or "train"
    if source.documents is None:
        return datasets.load_dataset(source.path, source.config, split=split)
    stream = datasets.load_dataset(source.path, source.config, split=split, streaming=True)
    if column in (stream.column_names or [column]):
        stream = stream.select_columns(column)
    return datasets.Dataset.from_generator(_rows, gen_kwargs={"stream": stream.take(source.documents)})


def _rows(stream: datasets.IterableDataset) -> Any:
    yield from stream


def _read_texts(path: Path) -> list[str]:
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path}: there is no .txt file in this folder")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text: {error}") from error
    return texts
