"""Supervised fine-tuning: what is a label and what is not, and that a run learns answers only."""

import json

import pytest
import torch
from torch.nn import functional

import finetune_qwen3
from qat_patch import patch_model
from qat_recipes.data.chat import IGNORED, load_chat
from qat_recipes.data.text import TextSource
from qat_recipes.tasks.language_modeling import NextToken
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_recipe import byte_tokenizer, write_inputs
from support.runs.runs import log, run

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer():
    made = byte_tokenizer()
    made.chat_template = TEMPLATE
    return made


def chat(*contents):
    roles = ["user", "assistant"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextSource(path=str(path))


def test_only_the_last_answer_is_labelled(tmp_path):
    conversations = [chat("hi", "yes"), chat("a", "b", "cc", "dddd"), chat("x" * 20, "y")]
    source = write(tmp_path / "a.jsonl", *({"messages": messages} for messages in conversations))
    made = tokenizer()
    blocks = load_chat(source, made, 80)
    # The first two fit into one block, the third is a block of its own.
    assert len(blocks) == 2
    decode = lambda tokens: made.decode(tokens)  # noqa: E731
    first = blocks[0]
    one, two = "<user>hi\n<assistant>yes\n", "<user>a\n<assistant>b\n<user>cc\n<assistant>dddd\n"
    used = len(one) + len(two)
    assert decode(first["input_ids"][:used]) == one + two
    assert (first["input_ids"][used:] == made.eos_token_id).all()
    assert first["position_ids"].tolist() == [*range(len(one)), *range(len(two)), *range(80 - used)]
    labelled = first["labels"] != IGNORED
    assert decode(first["labels"][labelled]) == "yes\ndddd\n"
    assert torch.equal(first["labels"][labelled], first["input_ids"][labelled])


def test_the_loss_is_that_of_the_answer_alone(tmp_path):
    source, made = write(tmp_path / "a.jsonl", {"messages": chat("what is it", "a cat")}), tokenizer()
    block = load_chat(source, made, 64)[0]
    model = tiny_qwen3(vocab_size=len(made))
    patch_model(model)
    objective = NextToken()
    inputs = objective.inputs({name: x[None] for name, x in block.items()})
    outputs = objective.outputs(model, inputs)
    text, answer = "<user>what is it\n<assistant>a cat\n", "a cat\n"
    ids = torch.tensor(made(text)["input_ids"])
    start = len(text) - len(answer)
    expected = functional.cross_entropy(outputs[0, start - 1 : len(text) - 1].float(), ids[start:])
    torch.testing.assert_close(objective.loss(outputs, inputs), expected)
    # And the padding behind it changes nothing about it.
    alone = {"input_ids": ids[None], "position_ids": torch.arange(len(ids))[None]}
    torch.testing.assert_close(outputs[0, : len(ids)], objective.outputs(model, objective.inputs(alone))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_learns_to_answer(tmp_path):
    write_inputs(tmp_path)
    tokenizer().save_pretrained(tmp_path / "model")
    questions = [f"is {number} even" for number in range(10, 40)]
    rows = [{"messages": chat(question, "yes" if int(question[4]) % 2 else "no")} for question in questions]
    write(tmp_path / "train.jsonl", *rows)
    write(tmp_path / "eval.jsonl", *rows[:4])
    values = {
        "steps": 12,
        "batch_size": 2,
        "learning_rate": 3e-3,
        "eval_every": 12,
        "data.chat": "true",
        "data.sequence_length": 96,
    }
    values |= {"model.path": tmp_path / "model", "data.train.path": tmp_path / "train.jsonl", "output_dir": tmp_path / "run"}
    run(finetune_qwen3, values | {"data.eval.path": tmp_path / "eval.jsonl"})
    records = log(tmp_path / "run")
    assert records[-1]["eval_loss_fp4"] < records[0]["eval_loss_fp4"] / 2


@pytest.mark.parametrize(
    ("row", "length", "message"),
    [
        ({"text": "x"}, 64, "expected 'messages' to be a list, got None"),
        ({"messages": chat("x")}, 64, "row 1: expected a list of at least two messages"),
        ({"messages": ["x", "y"]}, 64, "row 1: expected a list of at least two messages with role and content"),
        ({"messages": chat("x", "y", "z")}, 64, "expected the last message to be the assistant's, got one of 'user'"),
        ({"messages": chat("x" * 90, "y")}, 64, "1 conversations, and 1 of them are longer than data.sequence_length"),
    ],
)
def test_rows_that_are_no_conversations(tmp_path, row, length, message):
    with pytest.raises(ValueError, match=message):
        load_chat(write(tmp_path / "a.jsonl", row), tokenizer(), length)


@pytest.mark.parametrize("content", [None, "", " \n", [], [{"type": "text", "text": ""}], [{"type": "text", "text": None}], 3])
def test_an_answer_that_says_nothing_is_not_learned(tmp_path, content):
    rows = [{"messages": chat("x", "y")}] * 6 + [{"messages": chat("x", "y", "z", content)}]
    with pytest.raises(
        ValueError, match=r"row 7: expected message 4 of 4 to say something, got .* as its content; fix or delete"
    ):
        load_chat(write(tmp_path / "a.jsonl", *rows), tokenizer(), 64)


def test_null_before_the_answer_is_not_read_as_a_word(tmp_path):
    with pytest.raises(ValueError, match="row 1: expected message 1 of 2 to say something, got None"):
        load_chat(write(tmp_path / "a.jsonl", {"messages": chat(None, "y")}), tokenizer(), 64)
    # A system prompt may be empty, and who calls a tool need not say anything.
    made = tokenizer()
    made.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content or m.tool_calls }}")
    messages = [{"role": "system", "content": ""}, *chat("x", None)]
    messages[-1]["tool_calls"] = ["call"]
    assert len(load_chat(write(tmp_path / "b.jsonl", {"messages": messages}), made, 64)) == 1


def test_half_a_character_in_a_conversation(tmp_path):
    with pytest.raises(ValueError, match="a.jsonl, line 2: half a character in its text"):
        load_chat(write(tmp_path / "a.jsonl", {"messages": chat("x", "y")}, {"messages": chat("x", "\ud800")}), tokenizer(), 64)


def test_templates_that_do_not_fit(tmp_path, capsys):
    source, made = write(tmp_path / "a.jsonl", {"messages": chat("x", "y")}, {"messages": chat("x" * 90, "y")}), byte_tokenizer()
    with pytest.raises(ValueError, match="data.chat: the tokenizer has no chat template"):
        load_chat(source, made, 64)
    made.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(ValueError, match="the chat template changes the prompt when an answer follows"):
        load_chat(source, made, 64)
    assert len(load_chat(source, tokenizer(), 64)) == 1
    assert "1 of 2 conversations are longer than 64 tokens and left out" in capsys.readouterr().out
