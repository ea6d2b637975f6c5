"""Text to blocks of tokens, and what is refused on the way."""

import json
import os

import datasets
import pytest
import torch

from qat_recipes.data.documents import TextSource, load_documents
from qat_recipes.data.text import ShuffledBatches, TextSettings, check_vocabulary, fingerprint_of_blocks, load_blocks, load_source
from support.models.tiny_recipe import byte_tokenizer, words


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else rows[0]
    path.write_text(text, encoding="utf-8")
    return str(path)


def texts(**source):
    return load_documents(TextSource(**source))["text"][:]


@pytest.mark.parametrize(
    ("length", "positions"),
    [
        (4, [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]]),  # abcd e.fg .hij klmn (op.)
        (5, [[0, 1, 2, 3, 4], [0, 0, 1, 2, 0], [0, 1, 2, 3, 4]]),  # abcde .fg.h ijklm (nop.)
        (19, [[0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]),
    ],
)
def test_documents_are_packed_with_an_end_token_and_cut(tmp_path, tokenizer, length, positions):
    documents = ["abcde", "fg", "", "  \n", "hijklmnop"]
    path = write(tmp_path / "data.jsonl", *({"text": text} for text in documents))
    blocks = load_source(TextSource(path=path), tokenizer, length)
    stream = [token for text in ("abcde", "fg", "hijklmnop") for token in (*tokenizer(text)["input_ids"], 0)]
    assert len(stream) == 19
    rows = [block["input_ids"] for block in blocks]
    assert all(row.shape == (length,) and row.dtype == torch.int64 for row in rows)
    assert torch.cat(rows).tolist() == stream[: 19 // length * length]
    assert [block["position_ids"].tolist() for block in blocks] == positions
    assert blocks[0]["position_ids"].dtype == torch.int64


def test_every_kind_of_local_source(tmp_path):
    file = write(tmp_path / "one.txt", "a\nb\n\nc")
    assert texts(path=file) == ["a\nb\n\nc"]
    write(tmp_path / "many/2.txt", "second")
    write(tmp_path / "many/1.txt", "first")
    write(tmp_path / "many/ignored.md", "no text")
    assert texts(path=str(tmp_path / "many")) == ["first", "second"]
    rows = write(tmp_path / "rows.jsonl", {"body": "x", "n": 1}, {"body": "y", "n": 2}, {"body": None, "n": 3})
    assert texts(path=rows, text_column="body") == ["x", "y"]
    assert texts(path=rows, text_column="body", documents=1) == ["x"]


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"text": "old"})
    assert texts(path=path) == ["old"]
    write(tmp_path / "rows.jsonl", {"text": "new"})
    assert texts(path=path) == ["new"]


def test_hub_datasets_are_loaded_by_name_config_and_split(monkeypatch):
    asked = []

    def load_dataset(path, config, *, split, streaming=False):
        asked.append((path, config, split, streaming))
        rows = datasets.Dataset.from_dict({"body": ["one", "two", "three"], "url": ["u"] * 3})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(path="org/data", text_column="body") == ["one", "two", "three"]
    assert texts(path="org/data", config="en", split="validation", text_column="body", documents=2) == ["one", "two"]
    assert asked == [("org/data", None, "train", False), ("org/data", "en", "validation", True)]
    for documents in (None, 2):
        with pytest.raises(ValueError, match="there is no column 'text'; set text_column to one of body, url"):
            load_documents(TextSource(path="org/data", documents=documents))


def test_held_out_blocks(tmp_path, tokenizer):
    train = write(tmp_path / "train.txt", words(400, seed=1))
    held_out = write(tmp_path / "eval.txt", words(100, seed=2))
    both = TextSettings(train=TextSource(path=train), eval=TextSource(path=held_out, blocks=3), sequence_length=32)
    everything, evaluation = load_blocks(both, tokenizer, load_source)
    assert len(evaluation) == 3
    assert tokenizer.decode(evaluation[0]["input_ids"]) == words(100, seed=2)[:32]

    split = TextSettings(train=TextSource(path=train), eval_fraction=0.2, sequence_length=32)
    first, last = load_blocks(split, tokenizer, load_source)
    assert len(last) == round(len(everything) * 0.2)
    joined = [block["input_ids"].tolist() for part in (first, last) for block in part]
    assert joined == [block["input_ids"].tolist() for block in everything]

    only = TextSettings(train=TextSource(path=train), sequence_length=32)
    assert load_blocks(only, tokenizer, load_source)[1] is None
    few = TextSettings(train=TextSource(path=train, blocks=1), eval_fraction=0.5, sequence_length=32)
    with pytest.raises(ValueError, match="0.5 of 1 blocks of 32 tokens leaves none to train on"):
        load_blocks(few, tokenizer, load_source)


def test_text_that_cannot_be_used_is_refused(tmp_path, tokenizer):
    def refused(match, **source):
        with pytest.raises(ValueError, match=match):
            load_source(TextSource(**source), tokenizer, 16)

    refused("blank.txt: there is no text in it", path=write(tmp_path / "blank.txt", " \n\n"))
    refused("short.txt: 1 document.* not fill one block of 16 tokens", path=write(tmp_path / "short.txt", "too short"))
    (tmp_path / "folder").mkdir()
    refused("there is no .txt file in this folder", path=str(tmp_path / "folder"))
    refused("empty.jsonl: expected JSON lines, got: nothing", path=write(tmp_path / "empty.jsonl"))
    (tmp_path / "blank.jsonl").write_text("\n\n")
    refused("blank.jsonl, line 1: expected a JSON object, got ''", path=str(tmp_path / "blank.jsonl"))
    (tmp_path / "torn.jsonl").write_text('{"text": "a"}\n{"text": "b')
    refused(
        r"torn.jsonl, line 2: expected a JSON object, got '{\"text\": \"b'.*fix or delete the line",
        path=str(tmp_path / "torn.jsonl"),
    )
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n' * 1000 + b'{"text": "\xff"}\n' + b'{"text": "c"}\n' * 1000)
    refused(r"bad.jsonl, line 1001: ", path=str(tmp_path / "bad.jsonl"))
    refused("no column 'text'; set text_column to one of body", path=write(tmp_path / "other.jsonl", {"body": "x"}))
    refused("column 'text' is not text", path=write(tmp_path / "numbers.jsonl", {"text": 1}))
    mixed = write(tmp_path / "mixed.jsonl", {"text": "a"}, {"text": 1})
    refused("column 'text' is not text", path=mixed)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    refused("latin.txt: not UTF-8 text", path=str(tmp_path / "latin.txt"))

    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_source(TextSource(path=write(tmp_path / "good.txt", words(50))), endless, 16)


def test_rows_without_text_are_never_dropped_silently(tmp_path, tokenizer, capsys):
    """A key that is missing is refused, with its line; null and blank texts are counted, with an example."""
    rows = [{"text": words(9, seed=number)} for number in range(60)]
    file = write(tmp_path / "misspelt.jsonl", *rows[:40], {"txet": "a"}, *rows[40:])
    with pytest.raises(
        ValueError,
        match="misspelt.jsonl, line 41: .* there is no column 'text'; set text_column to one of txet; or fix or delete",
    ):
        load_source(TextSource(path=file), tokenizer, 16)
    for empty in (None, "", " \n\t"):
        file = write(tmp_path / "empty.jsonl", *rows[:40], {"text": empty}, *rows[40:], {"text": empty})
        for _ in range(2):  # the second time from the cache
            whole = load_source(TextSource(path=file), tokenizer, 16)
            assert f"{file}: 2 of 62 rows have no text (null or blank), row 41 for one: left out" in capsys.readouterr().out
    good = load_source(TextSource(path=write(tmp_path / "good.jsonl", *rows)), tokenizer, 16)
    assert "left out" not in capsys.readouterr().out
    assert fingerprint_of_blocks(whole) == fingerprint_of_blocks(good)


def test_of_the_hub_too(monkeypatch, capsys):
    rows = datasets.Dataset.from_dict({"text": ["one", None, " ", "four"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows)
    assert texts(path="org/data") == ["one", "four"]
    assert "org/data: 2 of 4 rows have no text (null or blank), row 2 for one" in capsys.readouterr().out


@pytest.mark.parametrize("text", ['"a \\ud83d b"', '"\\udc00"', '["\\ud800"]', '{"deep": ["\\uDFFF"]}'])
def test_half_a_character_is_named_with_its_line(tmp_path, text):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00 is whole"}\n' * 4 + '{"text": "a", "more": ' + text + "}\n")
    with pytest.raises(ValueError, match="a.jsonl, line 5: half a character in its text .*; fix or delete the line"):
        load_documents(TextSource(path=str(tmp_path / "a.jsonl")))
    assert texts(path=str(tmp_path / "a.jsonl"), documents=4) == ["\U0001f600 is whole"] * 4


def test_a_changed_file_is_read_again_whatever_its_time(tmp_path):
    for name in ("rows.jsonl", "text.txt"):
        for text in ("old", "new"):
            path = write(tmp_path / name, {"text": text} if name == "rows.jsonl" else text)
            os.utime(path, (10**9, 10**9))
            assert texts(path=path) == [text]


def test_blocks_have_a_fingerprint(tmp_path, tokenizer):
    rows = [{"text": words(9, seed=number)} for number in range(60)]
    first = load_source(TextSource(path=write(tmp_path / "a.jsonl", *rows)), tokenizer, 16)
    again = load_source(TextSource(path=write(tmp_path / "b.jsonl", *rows)), tokenizer, 16)
    assert fingerprint_of_blocks(first) == fingerprint_of_blocks(again)
    others = [
        first.select(range(len(first) - 1)),
        first.select([1, 0, *range(2, len(first))]),
        load_source(TextSource(path=write(tmp_path / "c.jsonl", *rows[:-1], {"text": words(9, seed=99)})), tokenizer, 16),
        load_source(TextSource(path=write(tmp_path / "d.jsonl", *rows)), tokenizer, 17),
    ]
    assert len({fingerprint_of_blocks(blocks) for blocks in (first, *others)}) == 5


def test_a_tokenizer_larger_than_the_model(tokenizer):
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match="a tokenizer for a vocabulary of 256 tokens, got one with 257: .* has the number 256"):
        check_vocabulary(tokenizer, 256)
    # Numbers need not be without gaps.
    larger = byte_tokenizer()
    larger.add_special_tokens({"pad_token": "<pad>"})
    with pytest.raises(ValueError, match="'<pad>' has the number 257"):
        check_vocabulary(larger, 257)


def test_batches_are_shuffled_by_epoch_and_can_start_anywhere():
    whole = list(ShuffledBatches(samples=7, batch_size=2, seed=0, start=0, stop=9))
    assert len(whole) == 9 and all(len(batch) == 2 for batch in whole)
    epochs = [[index for batch in whole[first : first + 3] for index in batch] for first in (0, 3, 6)]
    assert all(len(set(epoch)) == 6 and set(epoch) <= set(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    for start in range(9):
        assert list(ShuffledBatches(7, 2, 0, start, 9)) == whole[start:]
    assert list(ShuffledBatches(7, 2, 1, 0, 9)) != whole
