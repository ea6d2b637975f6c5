"""qat-patch evaluate --tasks: lm-evaluation-harness through its own Python API, with tasks of our own that need no network."""

import json
from functools import partial

import pytest

from qat_patch import export_checkpoint, patch_model
from qat_patch.cli import main
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
    tiny_qwen3(vocab_size=100, num_hidden_layers=1).save_pretrained(folder / "small")
    tokenizer.save_pretrained(folder / "small")
    patch_model(model)
    export_checkpoint(model, folder / "export", tokenizer=tokenizer)
    return folder


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the harness's thousands of tasks, which take seconds to list, and its 100,000 samples for standard errors."""
    lm_eval, tasks = pytest.importorskip("lm_eval"), pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.simple_evaluate", partial(lm_eval.simple_evaluate, bootstrap_iters=0))


def evaluate(folder, model, tmp_path, *arguments, tasks="tiny_choice,tiny_text"):
    """What the command measured, by attention; the same was printed."""
    file = tmp_path / "results.json"
    options = ["--tasks", tasks, "--include-path", str(folder / "tasks"), "--json", str(file), "--device", "cpu"]
    assert main(["evaluate", str(folder / model), *options, *arguments]) == 0
    results = json.loads(file.read_text())["attentions"]
    file.unlink()
    return results


def test_an_export_and_a_model_in_each_attention(folder, tmp_path, monkeypatch, capsys):
    calls, attention = [], transformers_attention.attention
    monkeypatch.setattr(transformers_attention, "attention", lambda *a, **k: calls.append(a) or attention(*a, **k))
    results = evaluate(folder, "export", tmp_path, "--batch-size", "3")
    words = {name: values["tiny_text"]["word_perplexity,none"] for name, values in results.items()}
    assert list(words) == ["original", "exported"]
    assert words["original"] != words["exported"] and words["original"] == pytest.approx(words["exported"], rel=0.3)
    assert 0 <= results["exported"]["tiny_choice"]["acc,none"] <= 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "word_perplexity,none" in line)
    assert [float(cell) for cell in line.split()[2:]] == pytest.approx(list(words.values()), abs=1e-4)
    plain = evaluate(folder, "plain", tmp_path, "--batch-size", "3", "--attention", "original,nvfp4")
    assert plain == {"original": results["original"], "nvfp4": results["exported"]}
    calls.clear()
    assert evaluate(folder, "plain", tmp_path, "--attention", "original", "--batch-size", "3") == {
        "original": results["original"]
    }
    assert not calls
    without = evaluate(folder, "plain", tmp_path, "--attention", "original,nvfp4", "--exclude", "*.0.*", "--batch-size", "3")
    assert without["nvfp4"] != plain["nvfp4"] and without["original"] == plain["original"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("export", ["--tasks", "no_such_task"], "lm-eval has no no_such_task"),
        ("export", ["--tasks", "tiny_choice", "--batch-size", "0"], "--batch-size: expected at least 1"),
        ("export", ["--tasks", "tiny_choice", "--exclude", "*.0.*"], "the model is patched, which says which modules"),
        (
            "small",
            ["--tasks", "tiny_choice"],
            "--tasks: the tokenizer makes token 256, and the model knows 100; they do not belong",
        ),
    ],
)
def test_mistakes(folder, capsys, model, arguments, message):
    assert main(["evaluate", str(folder / model), *arguments, "--include-path", str(folder / "tasks"), "--device", "cpu"]) == 1
    assert message in capsys.readouterr().err
