"""Texts from the Hub or from local files. A row without text is refused, or left out with a message, never dropped silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from qat_patch.checkpoint import integrity

from .json_lines import read_json_lines


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
    """Take only this many documents, from the first; of a Hub dataset only these are downloaded."""
    blocks: int | None = None
    """Take only this many blocks of the cut documents, from the first."""

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
                raise ValueError(f"{name}: only datasets of the Hub have one, and {self.path} is local; set it to null")
        if Path(self.path).is_dir() or self.path.endswith(".txt"):
            if self.text_column is not None:
                raise ValueError(f"text_column: text files have no columns, and {self.path} is one or holds them; set it to null")
        elif not self.path.endswith(".jsonl"):
            raise ValueError(f"path: expected a .txt or .jsonl file, a folder or a Hub dataset, got {self.path}")

    def same_text_as(self, other: TextSource) -> bool:
        """Whether the texts overlap: both sources read the same text from the start."""
        return (self.path, self.config, self.split or "train") == (other.path, other.config, other.split or "train")

    @property
    def is_local(self) -> bool:
        """Whether `path` is a file or folder. Anything that looks like a path is never looked up on the Hub."""
        return Path(self.path).exists() or self.path.endswith((".txt", ".jsonl")) or self.path.startswith((".", "/", "~"))


def load_documents(source: TextSource) -> datasets.Dataset:
    """The documents of a source: rows of `text`. Those whose text is null or blank are left out, and counted.

    Raises:
        ValueError: a file cannot be read, the column does not exist, or it is not text.
    """
    column = source.text_column or "text"
    if not source.is_local:
        documents = _load_from_hub(source, column)
    elif source.path.endswith(".jsonl") and Path(source.path).is_file():
        documents = _load_json_lines(Path(source.path), column, source.documents)
    else:
        documents = datasets.Dataset.from_dict({"text": _read_texts(Path(source.path))[: source.documents]})
    with_text = documents.filter(_not_blank, input_columns="text")
    if missing := len(documents) - len(with_text):
        example = next(number for number, text in enumerate(documents["text"], 1) if not _not_blank(text))
        print(f"{source.path}: {missing} of {len(documents)} rows have no text (null or blank), row {example} for one: left out")
    if len(with_text) == 0:
        raise ValueError(f"{source.path}: there is no text in it")
    return with_text


def _not_blank(text: str | None) -> bool:
    return bool(text and text.strip())


def _load_json_lines(file: Path, column: str, limit: int | None) -> datasets.Dataset:
    if not file.stat().st_size:
        raise ValueError(f"{file}: expected JSON lines, got: nothing")
    # The key of the datasets cache. It has the file's hash, because the file's time may not change with its content.
    arguments = {"file": str(file), "column": column, "limit": limit, "sha256": integrity.sha256(file)}
    features = datasets.Features({"text": datasets.Value("large_string")})
    try:
        return datasets.Dataset.from_generator(_texts, gen_kwargs=arguments, features=features)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _texts(file: str, column: str, limit: int | None, sha256: str) -> Iterator[dict[str, str | None]]:
    for row in islice(read_json_lines(Path(file), {column: str}, may_be_null=True), limit):
        yield {"text": row[column]}


def _load_from_hub(source: TextSource, column: str) -> datasets.Dataset:
    split = source.split or "train"
    if source.documents is None:
        documents = datasets.load_dataset(source.path, source.config, split=split)
    else:
        stream = datasets.load_dataset(source.path, source.config, split=split, streaming=True)
        if column in (stream.column_names or [column]):
            stream = stream.select_columns(column)
        documents = datasets.Dataset.from_generator(_rows, gen_kwargs={"stream": stream.take(source.documents)})
    if column not in documents.column_names:
        raise ValueError(
            f"{source.path}: there is no column {column!r}; set text_column to one of {', '.join(documents.column_names)}"
        )
    if getattr(documents.features[column], "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"{source.path}: the column {column!r} is not text but {documents.features[column]}")
    return documents.select_columns(column).rename_columns({column: "text"})


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
