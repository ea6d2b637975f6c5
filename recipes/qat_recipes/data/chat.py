"""Conversations as blocks of tokens for supervised fine-tuning: only the assistant's last message counts in the loss."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets

from .documents import TextSource
from .json_lines import read_json_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label that transformers and torch leave out of the loss."""


def load_chat(source: TextSource, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> datasets.Dataset:
    """Blocks of whole conversations: rows of `input_ids`, `position_ids` and `labels`, all int64 [sequence_length].

    A row of the source is a list of messages, each with `role` and `content`, in the column `text_column` (default `messages`);
    the last one is the assistant's. The tokenizer's chat template turns them into text. Labels are the tokens of the last message
    and IGNORED elsewhere, so that the prompt and earlier turns are read but not learned. Conversations are packed in order, do
    not see each other, and are never cut: those longer than a block are left out, and if the next one does not fit, the rest of
    the block is filled with end-of-text tokens.

    Raises:
        ValueError: a row is not a conversation or has no answer, there is no chat template or it changes the prompt when an
            answer follows, or no conversation fits.
    """
    if tokenizer.chat_template is None:
        raise ValueError("data.chat: the tokenizer has no chat template; take a model that was made for chats, or set one")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token (eos_token), which fills up blocks; set one")
    blocks: list[dict[str, list[int]]] = []
    block: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
    found = too_long = 0

    def close() -> None:
        missing = sequence_length - len(block["input_ids"])
        filling = {"input_ids": tokenizer.eos_token_id, "labels": IGNORED}
        blocks.append({name: values + [filling.get(name, 0)] * missing for name, values in block.items()})
        blocks[-1]["position_ids"][sequence_length - missing :] = range(missing)

    for where, messages in _conversations(source):
        prompt, tokens = _encode(where, messages, tokenizer)
        found += 1
        if len(tokens) > sequence_length:
            too_long += 1
            continue
        if len(block["input_ids"]) + len(tokens) > sequence_length:
            close()
            block = {name: [] for name in block}
        block["input_ids"] += tokens
        block["position_ids"] += range(len(tokens))
        block["labels"] += [IGNORED] * len(prompt) + tokens[len(prompt) :]
    if block["input_ids"]:
        close()
    if not blocks:
        raise ValueError(
            f"{source.path}: {found} conversations, and {too_long} of them are longer than data.sequence_length "
            f"({sequence_length}); give more data or a larger one"
        )
    if too_long:
        print(f"{source.path}: {too_long} of {found} conversations are longer than {sequence_length} tokens and left out")
    return datasets.Dataset.from_list(blocks[: source.blocks]).with_format("torch")


def _encode(where: str, messages: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens before the last message, and all of them."""
    is_chat = isinstance(messages, list) and len(messages) > 1
    if not is_chat or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages):
        raise ValueError(f"{where}: expected a list of at least two messages with role and content, got {str(messages)[:80]}")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: expected the last message to be the assistant's, got one of {messages[-1]['role']!r}")
    for number, message in enumerate(messages, 1):
        # Templates write null as the word None, and an empty answer would teach only the end of the turn.
        is_answer, calls = message is messages[-1], message.get("tool_calls")
        if not calls and (message["content"] is None or (is_answer and not _says_something(message["content"]))):
            raise ValueError(
                f"{where}: expected message {number} of {len(messages)} to say something, got {message['content']!r} as its "
                "content; fix or delete the row"
            )
    write: Any = tokenizer.apply_chat_template
    prompt = write(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    tokens = write(messages, tokenize=True, return_dict=False)
    if tokens[: len(prompt)] != prompt or len(tokens) == len(prompt):
        raise ValueError(f"{where}: the chat template changes the prompt when an answer follows; set another template")
    return prompt, tokens


def _says_something(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    # Parts, such as {"type": "text", "text": ...}. Parts other than text always say something.
    parts = content if isinstance(content, list) else []
    return any(not isinstance(part, dict) or "text" not in part or _says_something(part["text"]) for part in parts)


def _conversations(source: TextSource) -> Iterator[tuple[str, Any]]:
    column = source.text_column or "messages"
    if source.is_local:
        if not source.path.endswith(".jsonl"):
            raise ValueError(f"data.chat: expected a .jsonl file or a dataset on the Hub, got {source.path}")
        rows: Any = read_json_lines(Path(source.path), {column: list})
    else:
        split = source.split or "train"
        rows = datasets.load_dataset(source.path, source.config, split=split, streaming=source.documents is not None)
    for number, row in enumerate(rows, 1):
        if source.documents is not None and number > source.documents:
            return
        if column not in row:
            raise ValueError(f"{source.path}: there is no column {column!r}; set text_column to one of {', '.join(row)}")
        yield f"{source.path}, row {number}", row[column]
