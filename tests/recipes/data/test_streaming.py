"""Streamed text: the blocks are those of the whole text, a run resumes at the exact block, and a bad line loses nothing."""

import json
import tracemalloc

import datasets
import pytest
import torch

import finetune_qwen3
from qat_recipes.data.streaming import StreamedBlocks, WindowBatches
from qat_recipes.data.text import TextSettings, TextSource, load_source
from qat_recipes.training import checkpoints
from support.models.tiny_recipe import byte_tokenizer, words, write_inputs
from support.runs.runs import assert_same_run, log, run, run_until_killed

LENGTH = 16


def write(path, count, seed=0):
    texts = [words(3 + number % 7, seed=seed + number) for number in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(path=str(path))


def rows(blocks, numbers):
    return [(blocks[number]["input_ids"].tolist(), blocks[number]["position_ids"].tolist()) for number in numbers]


def test_blocks_are_those_of_the_whole_text(tmp_path):
    source, tokenizer = write(tmp_path / "a.jsonl", 30), byte_tokenizer()
    whole = load_source(source, tokenizer, LENGTH)
    streamed = StreamedBlocks(source, tokenizer, LENGTH, window=4)
    first_round = len(whole)
    assert rows(streamed, range(first_round)) == rows(whole, range(first_round))
    # Then the text begins again behind what was left of it.
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] * 3
    tokens = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    for number in range(first_round, 2 * first_round):
        assert streamed[number]["input_ids"].tolist() == tokens[number * LENGTH : (number + 1) * LENGTH]
    with pytest.raises(IndexError, match="window 0 has been left behind"):
        streamed[0]


@pytest.mark.parametrize("is_local", [True, False])
def test_it_resumes_at_any_block(tmp_path, monkeypatch, is_local):
    source, tokenizer = write(tmp_path / "a.jsonl", 30), byte_tokenizer()
    if not is_local:
        hub, opened = datasets.Dataset.from_json(source.path), []
        monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: opened.append(k) or hub.to_iterable_dataset(num_shards=3))
        source = TextSource(path="someone/texts")
    whole = StreamedBlocks(source, tokenizer, LENGTH, window=4)
    expected = rows(whole, range(150))  # three rounds of the text
    assert whole.place["round"] >= 2
    for stop in (1, 4, 23, 61, 100):
        first = StreamedBlocks(source, tokenizer, LENGTH, window=4)
        rows(first, range(stop))
        first[stop + 2]  # Accelerate reads ahead
        state = json.loads(json.dumps(first.state_dict(stop)))
        second = StreamedBlocks(source, tokenizer, LENGTH, window=4)
        second.load_state_dict(state)
        assert rows(second, range(stop, 150)) == expected[stop:]
    if not is_local:
        assert opened[0] == {"split": "train", "streaming": True}


def test_batches_are_shuffled_in_windows_and_can_start_anywhere():
    whole = list(WindowBatches(window=6, batch_size=2, seed=0, start=0, stop=9))
    windows = [sorted(index for batch in whole[first : first + 3] for index in batch) for first in (0, 3, 6)]
    assert windows == [list(range(6)), list(range(6, 12)), list(range(12, 18))]
    assert [index % 6 for batch in whole[:3] for index in batch] != [index % 6 for batch in whole[3:6] for index in batch]
    for start in range(9):
        assert list(WindowBatches(6, 2, 0, start, 9)) == whole[start:]
    with pytest.raises(ValueError, match=r"data.streaming: expected a multiple of batch_size \(4\), got 6"):
        WindowBatches(6, 4, 0, 0, 9)


def settings(folder, name, text, **changes):
    values = {"steps": 8, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 3, "data.streaming": 4}
    values |= {
        "calibration_batches": 2,
        "layers_every": 4,
        "data.sequence_length": 32,
        "model.path": folder / "model",
        "data.train.path": text,
    }
    return values | {"output_dir": folder / name} | changes


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_killed_run_goes_on_and_a_bad_line_in_the_middle_loses_nothing(tmp_path):
    write_inputs(tmp_path)
    write(tmp_path / "good.jsonl", 25)
    run(finetune_qwen3, settings(tmp_path, "whole", tmp_path / "good.jsonl"))
    run_until_killed(finetune_qwen3, settings(tmp_path, "killed", tmp_path / "good.jsonl"), "checkpoint-6")
    run(finetune_qwen3, settings(tmp_path, "killed", tmp_path / "good.jsonl", resume="latest"))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")

    # The same text, with a line torn that the run comes to when it has a checkpoint.
    text = tmp_path / "torn.jsonl"
    lines = (tmp_path / "good.jsonl").read_text().splitlines(keepends=True)
    text.write_text("".join([*lines[:20], '{"text": "and th\n', *lines[20:]]))
    with pytest.raises(
        ValueError, match=r"torn.jsonl, line 21: expected a JSON object, got '\{\"text\": \"and th'.*fix or delete"
    ):
        run(finetune_qwen3, settings(tmp_path, "torn", text))
    assert list(checkpoints.steps_in(tmp_path / "torn")) == [3]
    text.write_text("".join(lines))
    run(finetune_qwen3, settings(tmp_path, "torn", text, resume="latest"))
    assert_same_run(tmp_path / "whole", tmp_path / "torn")
    assert [record["step"] for record in log(tmp_path / "torn")] == list(range(1, 9))


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_stream_calibrates_on_no_more_than_it_remembers(tmp_path):
    write_inputs(tmp_path)
    write(tmp_path / "good.jsonl", 25)
    with pytest.raises(ValueError, match=r"calibration_batches: a stream remembers a window of 4 blocks .* and these are 6"):
        run(finetune_qwen3, settings(tmp_path, "run", tmp_path / "good.jsonl", calibration_batches=3))
    assert not (tmp_path / "run").exists()


def test_a_long_document_is_held_once_and_never_written(tmp_path):
    """Tokens are not in checkpoints, nothing is copied for each window, and what is held is a few bytes a token."""
    count = 1 << 18
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": "a" * count}) + "\n")
    tokenizer, source = byte_tokenizer(), TextSource(path=str(tmp_path / "book.jsonl"))
    stream = StreamedBlocks(source, tokenizer, LENGTH, window=4)
    stream[0]
    held = stream.document.untyped_storage()
    tracemalloc.start()
    for number in range(0, 4000, 4):
        stream[number]
        assert len(json.dumps(stream.state_dict(number))) < 500
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 200_000
    assert held.nbytes() <= 4 * (count + 1) and stream.document.untyped_storage().data_ptr() == held.data_ptr()
    state = json.loads(json.dumps(stream.state_dict(3996)))
    again = StreamedBlocks(source, tokenizer, LENGTH, window=4)
    again.load_state_dict(state)
    assert rows(again, range(3996, 4004)) == rows(stream, range(3996, 4004))


def test_changed_text_is_not_continued(tmp_path):
    source, tokenizer = write(tmp_path / "a.jsonl", 30), byte_tokenizer()
    lines = (tmp_path / "a.jsonl").read_text().splitlines(keepends=True)
    stream = StreamedBlocks(source, tokenizer, LENGTH, window=2)
    rows(stream, range(9))
    state = stream.state_dict(8)
    read = state["rows"] + (state["used"] > 0)
    assert 3 < read < 25 and state["used"] > 0

    def goes_on(changed):
        (tmp_path / "a.jsonl").write_text("".join(changed))
        other = StreamedBlocks(source, tokenizer, LENGTH, window=2)
        other.load_state_dict(json.loads(json.dumps(state)))
        return rows(other, range(8, 12))

    expected = goes_on(lines)
    # Text that was not read yet can be corrected. Before that, no word, row, order or end may change.
    assert goes_on([*lines[:25], *lines[26:]]) == expected
    other = json.dumps({"text": "other"}) + "\n"
    for changed in (
        [*lines[: read - 1], other, *lines[read:]],
        [other, *lines[1:]],
        lines[1:],
        [other, *lines],
        [lines[1], lines[0], *lines[2:]],
        lines[: read - 1],
    ):
        with pytest.raises(
            ValueError, match=f"resume: .*a.jsonl is not what it was: of the {read} rows .* give it the same text"
        ):
            goes_on(changed)
    with pytest.raises(ValueError, match="resume: expected a place in a stream"):
        StreamedBlocks(source, tokenizer, LENGTH, window=2).load_state_dict({"window": 0, "tokens": []})


def test_text_that_changes_between_two_rounds(tmp_path):
    source = write(tmp_path / "a.jsonl", 6)
    stream = StreamedBlocks(source, byte_tokenizer(), LENGTH, window=1)
    while stream.place["round"] == 0:
        stream[stream.place["window"]]
    write(tmp_path / "a.jsonl", 6, seed=50)
    with pytest.raises(ValueError, match="a.jsonl: the text has changed since the run read it for the first time"):
        while stream.place["round"] < 3:
            stream[stream.place["window"]]


def test_half_a_character_is_named_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: half a character in its text"):
        StreamedBlocks(TextSource(path=str(tmp_path / "a.jsonl")), byte_tokenizer(), LENGTH, 4)[0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: [{"text": "\ud800"}])
    with pytest.raises(ValueError, match="someone/texts, row 1: half a character"):
        StreamedBlocks(TextSource(path="someone/texts"), byte_tokenizer(), LENGTH, 4)[0]


def test_mistakes(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    for source, message in (
        (TextSource(path=str(tmp_path / "a.txt")), r"data.streaming: expected a .jsonl file"),
        (TextSource(path="someone/texts", blocks=3), "data.train.blocks: a stream goes on"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamedBlocks(source, tokenizer, LENGTH, 4)
    with pytest.raises(ValueError, match="there is no text in it"):
        StreamedBlocks(TextSource(path=str(tmp_path / "blank.jsonl")), tokenizer, LENGTH, 4)[0]
    with pytest.raises(ValueError, match=r"line 1: expected 'body' to be a str, got None"):
        StreamedBlocks(TextSource(path=str(tmp_path / "blank.jsonl"), text_column="body"), tokenizer, LENGTH, 4)[0]
    with pytest.raises(ValueError, match="data.streaming: expected a number of blocks from 1 up"):
        TextSettings(train=TextSource(path="someone/texts"), sequence_length=8, streaming=4, eval_fraction=0.5)
    assert torch.is_tensor(StreamedBlocks(write(tmp_path / "b.jsonl", 9), tokenizer, 8, 2)[3]["input_ids"])
