"""Text that the model writes itself: what it writes, how it is resumed, and what is refused."""

import json
import os
import shutil
import types

import datasets
import pytest
import torch
import transformers

import finetune_qwen3
from qat_kernels import KVCache
from qat_patch import get_linear_handle, load_checkpoint, patch_model
from qat_recipes.command_line import read_settings
from qat_recipes.data.documents import TextSource
from qat_recipes.data.generated import GenerateSettings, generated_text
from qat_recipes.data.text import pack_sequences
from qat_recipes.tasks.language_modeling import Settings
from support.models.tiny_qwen3 import tiny_qwen3
from support.models.tiny_recipe import byte_tokenizer, words
from support.runs.qwen3_runs import BARE, finetune, settings
from support.runs.runs import assert_same_run, command_line, log, run_until_killed

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
TOKENIZER = byte_tokenizer()
GENERATE = {"sequences": 10, "batch_size": 4, "length": 40}
RUN = {
    "data.train.path": ...,
    "data.train.blocks": ...,
    "distillation": 1.0,
    **{f"data.generate.{name}": value for name, value in GENERATE.items()},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def model(dtype=torch.float64, **options):
    return tiny_qwen3(dtype, vocab_size=len(TOKENIZER), num_hidden_layers=1, head_dim=16, **options)


def process(index=0, count=1):
    """What is asked of Accelerate. Processes that write one after the other need not wait."""
    what = {"process_index": index, "num_processes": count, "is_main_process": index == 0, "is_local_main_process": False}
    return types.SimpleNamespace(device=torch.device("cpu"), wait_for_everyone=lambda: None, **what)


def write(folder, length=40, build=model, accelerator=None, **changes):
    chosen = GenerateSettings(**GENERATE | changes)
    options = {"origin": {"model.path": "tiny"}, "tokenizer": TOKENIZER, "load": build, "digest": lambda model: "weights"}
    found = generated_text(chosen, length=length, folder=folder, accelerator=accelerator or process(), **options)
    return found["tokens"][:]


def test_sequences_are_samples_of_the_model(tmp_path, monkeypatch):
    """With its own end tokens, and nothing of its generation config that the settings do not name."""

    def build():
        made = model()
        made.generation_config.update(eos_token_id=[7, 9], top_k=1, repetition_penalty=5.0)
        return made

    found = write(tmp_path / "a", sequences=400, batch_size=200, build=build, length=12)
    assert len(found) == 400 and all(row[0] == 0 for row in found)  # no BOS: the token that ends a text
    assert all(len(row) == 12 or row[-1] in (0, 7, 9) for row in found) and any(len(row) < 12 for row in found)
    assert not any(token in (0, 7, 9) for row in found for token in row[1:-1])
    with torch.no_grad():
        expected = build()(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([row[1] for row in found]), minlength=len(TOKENIZER)) / 400
    assert (counts - expected).abs().sum() < (expected.flip(0) - expected).abs().sum() and len({row[1] for row in found}) > 20
    first = json.loads((tmp_path / "a" / "batch-000000.json").read_text())
    assert first["text"][:3] == [TOKENIZER.decode(row) for row in found[:3]]


def test_temperature_and_top_p(tmp_path):
    likeliest = write(tmp_path / "a", temperature=1e-4)
    assert likeliest == write(tmp_path / "b", top_p=1e-4) and len({tuple(row) for row in likeliest}) == 1
    assert write(tmp_path / "c") != write(tmp_path / "d", seed=1)


def test_random_numbers_of_the_run_are_left_alone(tmp_path):
    before = torch.get_rng_state()
    found = write(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert write(tmp_path / "b") == found


@pytest.mark.parametrize("attention", ["original", "fp4"])
def test_prompts_are_the_beginnings_of_documents(attention, tmp_path, monkeypatch):
    """Of several lengths, again from the first; batches with padding are as good as sequences alone."""
    made = []
    monkeypatch.setattr(KVCache, "__init__", lambda self, init=KVCache.__init__: made.append(1) or init(self))
    texts = [words(count, seed=count) for count in (1, 4, 2)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def build():
        patched = model()
        if attention == "fp4":
            patch_model(patched)
        return patched

    options = {"prompts": TextSource(path=str(tmp_path / "prompts.jsonl")), "prompt_length": 9, "temperature": 1e-4}
    found = write(tmp_path / "a", build=build, attention=attention, sequences=7, **options)
    assert bool(made) == (attention == "fp4")
    prompts = [TOKENIZER(text)["input_ids"][:9] for text in texts]
    assert len({len(prompt) for prompt in prompts}) == 3 and len(found) == 7
    for number, row in enumerate(found):
        prompt = prompts[number % 3]
        assert row[: len(prompt)] == prompt and len(row) > len(prompt)
    # the likeliest tokens, found one by one
    alone, row = build(), found[0]
    for end in range(len(prompts[0]), len(row)):
        with torch.no_grad():
            assert alone(torch.tensor([row[:end]])).logits[0, -1].argmax() == row[end]


def test_resumes_at_the_next_batch_and_in_any_number_of_processes(tmp_path, monkeypatch):
    whole = write(tmp_path / "whole")
    generate, calls = transformers.GenerationMixin.generate, []

    def fail(self, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.GenerationMixin, "generate", fail)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "part")
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["batch-000000.json", "origin.json"]
    kept = (tmp_path / "part" / "batch-000000.json").stat().st_mtime_ns
    assert write(tmp_path / "part") == whole
    assert (tmp_path / "part" / "batch-000000.json").stat().st_mtime_ns == kept
    assert write(tmp_path / "part", build=None) == whole  # complete: the model is not even loaded
    with pytest.raises(ValueError, match="batch-000001.json is missing, which another process has written"):
        write(tmp_path / "two", accelerator=process(0, 2))
    assert write(tmp_path / "two", accelerator=process(1, 2)) == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "data.generate.temperature was 1.0 and is 0.5.*remove the folder"),
        ({"batch_size": 5}, "data.generate.batch_size was 4 and is 5"),
        ({"length": 41}, "data.generate.length was 40 and is 41"),
    ],
)
def test_other_text_is_refused(changes, message, tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a", **{"length": 40} | changes)


def test_each_process_loads_all_weights(tmp_path, monkeypatch):
    """Also where Accelerate is told that only the first one reads them, for the training shards them."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    seen = []
    write(tmp_path / "a", build=lambda: seen.append(os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"]) or model())
    assert seen == ["False"] and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "True"


def test_files_that_changed_are_refused(tmp_path):
    write(tmp_path / "a")
    file = tmp_path / "a" / "batch-000001.json"
    content = json.loads(file.read_text())
    content["tokens"][0][3] += 1
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="batch-000001.json cannot be used .its content has changed.*writes it again"):
        write(tmp_path / "a")
    file.unlink()
    assert write(tmp_path / "a") == write(tmp_path / "b")


def test_sequences_become_blocks(tmp_path):
    rows = datasets.Dataset.from_dict({"tokens": [[0, 5, 6, 7], [0, 8], [0, 9, 9, 9, 9, 9]]})
    blocks = pack_sequences(rows, 5)
    assert [block["input_ids"].tolist() for block in blocks] == [[0, 5, 6, 7, 0], [8, 0, 9, 9, 9]]
    assert [block["position_ids"].tolist() for block in blocks] == [[0, 1, 2, 3, 0], [0, 0, 1, 2, 3]]
    with pytest.raises(ValueError, match="3 sequence.s. that do not fill one block of 50 tokens"):
        pack_sequences(rows, 50)


def test_a_run_that_is_killed_while_it_writes_resumes_bit_for_bit(inputs, tmp_path):
    run = BARE | RUN
    finetune(inputs, tmp_path / "whole", **run)
    run_until_killed(finetune_qwen3, settings(inputs, tmp_path / "run", **run), "batch-000001")
    generated = tmp_path / "run" / "generated"
    assert sorted(path.name for path in generated.glob("*.json")) == ["batch-000000.json", "origin.json"]
    finetune(inputs, tmp_path / "run", **run)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert sorted(path.name for path in generated.iterdir())[-2:] == ["batch-000002.json", "origin.json"]
    assert log(tmp_path / "run")[-1]["kl"] > 0


def test_a_run_resumes_with_its_own_text_only(inputs, tmp_path):
    run = {"data.generate.attention": "fp4", "checkpoint_every": 1, "keep_checkpoints": 5, "steps": 2, "eval_every": 2}
    run = RUN | {"warmup_steps": 0, "data.eval_fraction": 0.3, "data.eval.path": ...} | run
    finetune(inputs, tmp_path / "run", **run)
    record = json.loads((tmp_path / "run" / "generated" / "origin.json").read_text())
    assert record["qat"]["spec"]["preset"] == "nvfp4" and record["data.generate.attention"] == "fp4"
    changes = {"resume": tmp_path / "run" / "checkpoint-1"}
    other = tmp_path / "other"
    finetune(inputs, tmp_path / "seeded", **run | {"data.generate.seed": 1, "steps": 1, "eval_every": 1})
    other.mkdir()
    # text of another seed that says it is this one's
    (tmp_path / "seeded" / "generated").rename(other / "generated")
    (tmp_path / "run" / "generated" / "origin.json").replace(other / "generated" / "origin.json")
    with pytest.raises(ValueError, match="the text that the model wrote changed since"):
        finetune(inputs, other, **run | changes)
    with pytest.raises(ValueError, match=r"data.generate.seed was 0 and is 1"):
        finetune(inputs, tmp_path / "new", **run | changes | {"data.generate.seed": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.generate.sequences": 0}, "data.generate.sequences: expected at least 1, got 0"),
        ({"data.generate.length": 1}, "data.generate.length: expected at least 2, or null, got 1"),
        ({"data.generate.temperature": 0}, "data.generate.temperature: expected a positive number, got 0"),
        ({"data.generate.top_p": 1.5}, "data.generate.top_p: expected a number above 0 and at most 1, got 1.5"),
        ({"data.generate.seed": -1}, "data.generate.seed: expected 0 or more"),
        ({"data.generate.prompt_length": 5}, "prompt_length: expected no number without prompts, got 5"),
        ({"data.generate.prompts.path": "model.jsonl"}, "there is no file or folder model.jsonl"),
        ({"data.generate.attention": "sdpa"}, "attention: expected original or fp4, got 'sdpa'"),
        ({"data.streaming": 4}, "data.generate: the model writes plain text.*leave out streaming and chat"),
        ({"data.train.path": "c4"}, "expected either train.*or generate.*got both"),
        (
            {"data.generate.sequences": ..., "data.generate.batch_size": ..., "data.generate.length": ...},
            "or generate.*got neither",
        ),
    ],
)
def test_settings_that_are_refused(changes, message, tmp_path):
    chosen = settings(
        tmp_path, tmp_path / "run", **RUN | BARE | {"data.train.path": ..., "model.path": "Qwen/Qwen3-0.6B"} | changes
    )
    with pytest.raises(ValueError, match=message):
        read_settings(Settings, command_line(chosen))


def test_prompts_that_are_refused(tmp_path):
    (tmp_path / "p.txt").write_text("some text")
    chosen = RUN | BARE | {"data.generate.prompts.path": tmp_path / "p.txt", "data.generate.prompt_length": 40}
    with pytest.raises(ValueError, match=r"prompt_length: expected less than the length of a sequence \(40\), got 40"):
        read_settings(Settings, command_line(settings(tmp_path, tmp_path / "run", **chosen)))
    chosen |= {"data.generate.prompt_length": 4, "data.generate.prompts.blocks": 4}
    with pytest.raises(ValueError, match="prompts are documents, not blocks"):
        read_settings(Settings, command_line(settings(tmp_path, tmp_path / "run", **chosen)))


def test_every_setting_is_explained(capsys):
    with pytest.raises(SystemExit):
        read_settings(Settings, ["--help"])
    shown = capsys.readouterr().out
    assert "data.generate.sequences (int; required with data.generate)" in shown and "data.generate.prompts.path" in shown


def test_with_linear_layers_in_4_bits_too(inputs, tmp_path):
    """The model that writes has ordinary ones. The one that learns from the text has not, and resumes to the bit."""
    changes = BARE | RUN | {"linear.format": "nvfp4", "steps": 2, "checkpoint_every": 1}
    finetune(inputs, tmp_path / "whole", **changes)
    plain = BARE | RUN | {"steps": 1}
    finetune(inputs, tmp_path / "plain", **plain)
    written = [json.loads((tmp_path / run / "generated" / "batch-000000.json").read_text()) for run in ("whole", "plain")]
    assert written[0]["text"] == written[1]["text"]
    assert log(tmp_path / "whole")[0]["loss"] > log(tmp_path / "plain")[0]["loss"]  # linear layers are further from the teacher
    assert all(layer.is_packed for layer in get_linear_handle(load_checkpoint(tmp_path / "whole" / "export")).layers.values())
    shutil.copytree(tmp_path / "whole", tmp_path / "run", ignore=shutil.ignore_patterns("export", "checkpoint-2"))
    finetune(inputs, tmp_path / "run", resume="latest", **changes)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
