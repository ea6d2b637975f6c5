"""Text that is never held as a whole: read as it comes, packed into blocks, and resumed at the exact block.

Blocks are shuffled within windows. What has to be remembered to go on is the place in the text where a window starts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch.utils.data import Dataset, Sampler

from .json_lines import read_json_lines
from .text import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 3
"""Accelerate reads one batch ahead, which may be of the next window."""


class StreamedBlocks(Dataset):
    """Packed blocks of a stream by number, to be asked for window by window: `input_ids` and `position_ids`, int64 [length].

    The stream starts again when it is over. Documents are packed as `load_source` packs them, and what is left at the end of
    the text goes on into the next round.

    Args:
        source: a .jsonl file or a dataset on the Hub.
        tokenizer: with an end-of-text token.
        sequence_length: tokens in a block.
        window: blocks that are held at a time.

    Raises:
        ValueError: a source that cannot be streamed, or text that cannot be read. What was read before is not lost: the run's
            checkpoints go on from where they are.
    """

    def __init__(self, source: TextSource, tokenizer: PreTrainedTokenizerBase, sequence_length: int, window: int) -> None:
        if source.is_local and not source.path.endswith(".jsonl"):
            raise ValueError(f"data.streaming: expected a .jsonl file or a dataset on the Hub, got {source.path}")
        if source.blocks is not None:
            raise ValueError("data.train.blocks: a stream goes on as long as the run; leave it out")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token (eos_token), which goes between documents; set one")
        self.source, self.tokenizer, self.sequence_length, self.window = source, tokenizer, sequence_length, window
        self.place: dict[str, Any] = {"window": 0, "round": 0, "rows": 0, "hub": None, "tokens": [], "positions": []}
        """Where the next window starts: rows of the text before it, and what is left of the document that lies across."""
        self.places = {0: copy.deepcopy(self.place)}
        self.blocks: dict[int, list[dict[str, torch.Tensor]]] = {}
        self.rows: Iterator[str] | None = None
        self.has_text = False

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, within = divmod(index, self.window)
        while number not in self.blocks:
            if number < self.place["window"]:
                raise IndexError(f"window {number} has been left behind; the stream is at {self.place['window']}")
            upcoming = self.place["window"]
            self.blocks[upcoming] = self._next_window()
            for old in [old for old in self.blocks if old <= self.place["window"] - _REMEMBERED]:
                del self.blocks[old]
            self.places = {at: place for at, place in self.places.items() if at > self.place["window"] - _REMEMBERED - 1}
            self.places[self.place["window"]] = copy.deepcopy(self.place)
        return self.blocks[number][within]

    def state_dict(self, next_block: int) -> dict[str, Any]:
        """Plain values from which `load_state_dict` goes on such that block `next_block` can be asked for."""
        return self.places[next_block // self.window]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at the window that `state_dict` was asked for."""
        self.place = copy.deepcopy(state)
        self.places, self.blocks, self.rows = {state["window"]: copy.deepcopy(state)}, {}, None

    def _next_window(self) -> list[dict[str, torch.Tensor]]:
        place, length = self.place, self.sequence_length
        while len(place["tokens"]) < self.window * length:
            ids = [*self.tokenizer(self._next_text(), verbose=False)["input_ids"], self.tokenizer.eos_token_id]
            # A position is 0 where a document starts and where a block does.
            first = len(place["tokens"])
            for offset in range(len(ids)):
                is_start = offset == 0 or (first + offset) % length == 0
                place["positions"].append(0 if is_start else place["positions"][-1] + 1)
            place["tokens"] += ids
        blocks = []
        for start in range(0, self.window * length, length):
            cut = {"input_ids": place["tokens"], "position_ids": place["positions"]}
            blocks.append({name: torch.tensor(values[start : start + length]) for name, values in cut.items()})
        del place["tokens"][: self.window * length], place["positions"][: self.window * length]
        place["window"] += 1
        return blocks

    def _next_text(self) -> str:
        if self.rows is None:
            self.rows, self.has_text = self._open(), self.place["rows"] > 0
        for text in self.rows:
            if text.strip():
                self.has_text = True
                return text
        if not self.has_text:
            raise ValueError(f"{self.source.path}: there is no text in it")
        self.place |= {"round": self.place["round"] + 1, "rows": 0, "hub": None}
        self.rows = None
        return self._next_text()

    def _open(self) -> Iterator[str]:
        """The texts from the place on, each counted before it is given."""
        column, limit, place = self.source.text_column or "text", self.source.documents, self.place
        if self.source.is_local:
            for number, row in enumerate(read_json_lines(Path(self.source.path), {column: str})):
                if number == limit:
                    return
                if number >= place["rows"]:
                    place["rows"] += 1
                    yield row[column]
            return
        stream = datasets.load_dataset(self.source.path, self.source.config, split=self.source.split or "train", streaming=True)
        stream = stream if limit is None else stream.take(limit)
        if place["hub"] is not None:
            stream.load_state_dict(place["hub"])
        for row in stream:
            if not isinstance(row.get(column), str):
                raise ValueError(
                    f"{self.source.path}: row {place['rows']}: expected text in the column {column!r}, got {row.get(column)!r}"
                )
            place["rows"] += 1
            place["hub"] = stream.state_dict()
            yield row[column]


class WindowBatches(Sampler[list[int]]):
    """Batches of block numbers, shuffled within each window, from batch number `start` of the run to `stop`.

    The order follows from the seed alone. A window holds a whole number of batches.
    """

    drop_last = True

    def __init__(self, window: int, batch_size: int, seed: int, start: int, stop: int) -> None:
        if window % batch_size:
            raise ValueError(f"data.streaming: expected a multiple of batch_size ({batch_size}), got {window}")
        self.window, self.batch_size, self.seed, self.start, self.stop = window, batch_size, seed, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order: list[int] = []
        for number in range(self.start, self.stop):
            window, position = divmod(number * self.batch_size, self.window)
            if position == 0 or not order:
                order = torch.randperm(self.window, generator=torch.Generator().manual_seed(self.seed + window)).tolist()
            yield [window * self.window + index for index in order[position : position + self.batch_size]]
