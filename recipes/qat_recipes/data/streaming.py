"""Text that is streamed: read as it comes, packed into blocks, and resumed at the exact block.

Blocks are shuffled within windows. To resume, only the place in the text where a window starts must be known.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch.utils.data import Dataset, Sampler

from .documents import TextSource
from .json_lines import check_characters, read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMEMBERED = 3
"""Windows to keep: Accelerate reads one batch ahead, which may belong to the next window."""


class StreamedBlocks(Dataset):
    """Packed blocks of a stream by number, to be read window by window: `input_ids` and `position_ids`, int64 [length].

    The stream starts again at its end. Documents are packed as in `load_source`, and the rest at the end of the text is carried
    into the next round. Only a few windows and the tokens of one document are in memory; a checkpoint holds only places.

    Args:
        source: a .jsonl file or a dataset on the Hub.
        tokenizer: with an end-of-text token.
        sequence_length: tokens per block.
        window: blocks per window.

    Raises:
        ValueError: a source cannot be streamed, or text cannot be read. Nothing is lost then: the run can resume from its
            checkpoints.
    """

    def __init__(self, source: TextSource, tokenizer: PreTrainedTokenizerBase, sequence_length: int, window: int) -> None:
        if source.is_local and not source.path.endswith(".jsonl"):
            raise ValueError(f"data.streaming: expected a .jsonl file or a dataset on the Hub, got {source.path}")
        if source.blocks is not None:
            raise ValueError("data.train.blocks: a stream goes on as long as the run; set it to null")
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end-of-text token (eos_token), which goes between documents; set one")
        self.source, self.tokenizer, self.sequence_length, self.window = source, tokenizer, sequence_length, window
        self.place: dict[str, Any] = {"window": 0, "round": 0, "rows": 0, "used": 0, "hub": None, "read": "", "whole": None}
        """Where the next window starts: the round, the rows before it (for the Hub `hub`, in the library's form), and how many
        tokens of the next row are used. `read` is a digest of these rows, `whole` that of all rows of an earlier round."""
        self.places = {0: copy.deepcopy(self.place)}
        self.blocks: dict[int, list[dict[str, torch.Tensor]]] = {}
        self.rows: Iterator[tuple[str, Any]] | None = None
        self.row_end: Any = None
        self.document = torch.empty(0, dtype=torch.int32)
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
        """Plain values for `load_state_dict`, to continue so that block `next_block` can be read."""
        return self.places[next_block // self.window]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the window of `state_dict`.

        Raises:
            ValueError: the state is not valid, or the text before it has changed. (A dataset on the Hub is not read again, so a
                change there is not noticed.)
        """
        if not isinstance(state, dict) or state.keys() != self.place.keys():
            raise ValueError(f"resume: expected a place in a stream ({', '.join(self.place)}), got {str(state)[:80]}")
        self.place, rows, used = copy.deepcopy(state), state["rows"], state["used"]
        self.places, self.blocks = {state["window"]: copy.deepcopy(state)}, {}
        self.rows, self.has_text = self._open(), rows + used > 0
        self.document = torch.empty(0, dtype=torch.int32)
        self.place["read"] = ""
        if self.source.is_local:
            for text, _ in islice(self.rows, rows):
                self._note(text)
        if used:
            text, self.row_end = next(self.rows, ("", None))
            self._note(text)
            self.document = self._tokens(text)[used:]
        if self.source.is_local and self.place["read"] != state["read"]:
            raise ValueError(
                f"resume: {self.source.path} is not what it was: of the {rows + (used > 0)} rows that the run had read when the "
                "checkpoint was written some have changed; give it the same text, or start another run in another output_dir"
            )
        self.place["read"] = state["read"]

    def _next_window(self) -> list[dict[str, torch.Tensor]]:
        length, size = self.sequence_length, self.window * self.sequence_length
        tokens, indices, filled = torch.empty(size, dtype=torch.int64), torch.arange(size), 0
        # A position is 0 where a document starts and where a block does.
        starts = indices % length == 0
        while filled < size:
            if not len(self.document):
                self.document = self._tokens(self._next_text())
                starts[filled] = True
            taken = self.document[: size - filled]
            tokens[filled : filled + len(taken)] = taken
            filled += len(taken)
            self.document = self.document[len(taken) :]
            self.place["used"] += len(taken)
            if not len(self.document):
                self._end_row(self.row_end)
        self.place["window"] += 1
        positions = indices - torch.where(starts, indices, 0).cummax(0).values
        # Copies, because blocks in the batches of a loader that reads ahead outlive their window.
        blocks = zip(tokens.split(length), positions.split(length), strict=True)
        return [{"input_ids": ids.clone(), "position_ids": at.clone()} for ids, at in blocks]

    def _tokens(self, text: str) -> torch.Tensor:
        """The tokens of one document as int32. The unused rest of a document is a view of them."""
        return torch.tensor([*self.tokenizer(text, verbose=False)["input_ids"], self.tokenizer.eos_token_id], dtype=torch.int32)

    def _note(self, text: str) -> None:
        digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.place["read"] = hashlib.sha256((self.place["read"] + digest).encode()).hexdigest()

    def _end_row(self, hub: Any) -> None:
        self.place |= {"rows": self.place["rows"] + 1, "used": 0, "hub": hub}

    def _next_text(self) -> str:
        """The next document, which is not blank."""
        if self.rows is None:
            self.rows, self.has_text = self._open(), False
        for text, end in self.rows:
            self._note(text)
            if text.strip():
                self.has_text, self.row_end = True, end
                return text
            self._end_row(end)
        if not self.has_text:
            raise ValueError(f"{self.source.path}: there is no text in it")
        if self.place["whole"] not in (None, self.place["read"]):
            raise ValueError(
                f"{self.source.path}: the text has changed since the run read it for the first time; give it the same text and "
                "go on from the newest checkpoint, or start another run"
            )
        self.place |= {
            "round": self.place["round"] + 1,
            "rows": 0,
            "used": 0,
            "hub": None,
            "read": "",
            "whole": self.place["read"],
        }
        self.rows = None
        return self._next_text()

    def _open(self) -> Iterator[tuple[str, Any]]:
        """The rows: of a file from the start, of the Hub from the place on; each with the library's place after it."""
        column, limit = self.source.text_column or "text", self.source.documents
        if self.source.is_local:
            for row in islice(read_json_lines(Path(self.source.path), {column: str}), limit):
                yield row[column], None
            return
        stream = datasets.load_dataset(self.source.path, self.source.config, split=self.source.split or "train", streaming=True)
        stream = stream if limit is None else stream.take(limit)
        if self.place["hub"] is not None:
            stream.load_state_dict(self.place["hub"])
        for number, row in enumerate(stream, self.place["rows"] + 1):
            where = f"{self.source.path}, row {number}"
            if not isinstance(row.get(column), str):
                raise ValueError(f"{where}: expected text in the column {column!r}, got {row.get(column)!r}")
            check_characters(where, row[column])
            yield row[column], stream.state_dict()


class WindowBatches(Sampler[list[int]]):
    """Batches of block numbers, shuffled within each window, from batch number `start` of the run to `stop`.

    The order depends only on the seed. A window holds a whole number of batches.
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
