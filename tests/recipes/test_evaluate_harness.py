"""lm-evaluation-harness through its own Python API, with a task of our own that needs no network."""

import json
from functools import partial

import pytest

import evaluate_harness
from qat_patch import export_checkpoint, patch_model
from qat_patch.hosts.transformers import attention as transformers_attention
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_recipe import byte_tokenizer

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: ["yes", "no"]
metric_list:
  - metric: acc
---
task: tiny_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("harness")
    rows = [
        {"question": f"is {number} more than {number * 2 % 7}, and are you sure", "answer": number % 2} for number in range(6)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    for number, task in enumerate(TASK.format(file=folder / "data.jsonl").split("---")):
        (folder / "tasks" / f"{number}.yaml").write_text(task)
    tokenizer = byte_tokenizer()
    model = tiny_qwen3(vocab_size=len(tokenizer), num_hidden_layers=2)
    model.save_pretrained(folder / "plain")
    tokenizer.save_pretrained(folder / "plain")
    patch_model(model)
    export_checkpoint(model, folder / "export", tokenizer=tokenizer)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the harness's thousands of tasks, which take seconds to list, and its 100,000 samples for standard errors."""
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.simple_evaluate", partial(lm_eval.simple_evaluate, bootstrap_iters=0))


def evaluate(folder, model, *arguments):
    tasks = ["tasks=[tiny_choice,tiny_text]", f"include_path={folder}/tasks"]
    return evaluate_harness.main([f"model={folder / model}", *tasks, *arguments])


def test_an_export_and_a_patched_model_in_both_kinds_of_attention(folder, tmp_path, monkeypatch, capsys):
    calls, attention = [], transformers_attention.attention
    monkeypatch.setattr(transformers_attention, "attention", lambda *a, **k: calls.append(a) or attention(*a, **k))
    results = evaluate(folder, "export", "batch_size=3", f"output={tmp_path}/results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert json.dumps(results, indent=1) in capsys.readouterr().out
    words = {name: values["tiny_text"]["word_perplexity,none"] for name, values in results.items()}
    assert words["original"] != words["fp4"] and words["original"] == pytest.approx(words["fp4"], rel=0.3)
    assert 0 <= results["fp4"]["tiny_choice"]["acc,none"] <= 1
    assert evaluate(folder, "plain", "batch_size=3") == results
    calls.clear()
    assert evaluate(folder, "plain", "attention=[original]", "batch_size=3") == {"original": results["original"]} and not calls
    assert evaluate(folder, "plain", "qat.exclude=['*.0.*']", "batch_size=3")["fp4"] != results["fp4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tasks=[]"], "settings.tasks: expected names of tasks"),
        (["attention=[fp4,fp4]"], "settings.attention: expected original, fp4 or both"),
        (["limit=0"], "settings.limit: expected at least 1"),
        (["tasks=[no_such_task]"], "lm-eval has no no_such_task"),
        (["qat.exclude=['*.0.*']"], "settings.qat: .* is an export and says itself what is patched"),
    ],
)
def test_mistakes(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate(folder, "export", *arguments)


def test_without_the_harness(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ValueError, match="pip install lm-eval"):
        evaluate_harness.main([f"model={tmp_path}", "tasks=[x]"])
