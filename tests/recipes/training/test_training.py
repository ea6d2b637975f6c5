"""The recipe for language models: that a run learns, what each of its settings does, and what is refused."""

import json
from itertools import accumulate, pairwise

import pytest
import torch
from accelerate import Accelerator

import evaluate_qwen3
from qat_patch import get_handle, load_checkpoint
from qat_patch.hosts.transformers import attention as transformers_attention
from support.runs.qwen3_runs import BARE, finetune
from support.runs.runs import assert_same_run, log, weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_a_run_learns_logs_and_exports(reference, inputs):
    records = log(reference)
    assert [record["step"] for record in records] == list(range(7))
    assert [record["step"] for record in records if "eval_loss_fp4" in record] == [0, 3, 6]
    assert records[-1]["eval_loss_fp4"] < records[0]["eval_loss_fp4"] - 0.5
    assert records[-1]["eval_loss_fp4"] != records[-1]["eval_loss_original"]
    assert [record["tokens"] for record in records[1:]] == [step * 4 * 64 for step in range(1, 7)]
    assert [record["learning_rate"] for record in records[1:]] == [0.0] + [1e-3] * 5
    timed = json.loads((reference / "metrics.jsonl").read_text().splitlines()[-1])
    assert timed["tokens_per_second"] > 0 and 0.05 < timed["peak_memory_gib"] < 64

    measured = evaluate_qwen3.main(
        [f"model={reference / 'export'}", f"text.path={inputs / 'eval.txt'}", "sequence_length=64", "batch_size=2"]
    )
    assert measured == {name: value for name, value in records[-1].items() if name.startswith("eval_")}
    assert set(measured) == {"eval_loss_original", "eval_loss_fp4", "eval_kl_between"} and measured["eval_kl_between"] > 1e-4
    card = (reference / "export" / "README.md").read_text()
    assert "| learning_rate | 0.001 |" in card and f"| eval_loss_fp4_after | {measured['eval_loss_fp4']:.6g} |" in card
    assert str(reference) not in card
    assert len(get_handle(load_checkpoint(reference / "export")).patched) == 2


def test_documents_of_a_block_do_not_see_each_other(inputs, tmp_path, monkeypatch):
    """Every call of 4-bit attention in training knows where they start; and the runs above resume with such blocks."""
    seen, attention = [], transformers_attention.attention

    def spy(q, k, v, **kwargs):
        if torch.is_grad_enabled():  # not the export's reference input
            seen.append(kwargs["cu_seqlens_q"])
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(transformers_attention, "attention", spy)
    changes = {"steps": 1, "accumulation_steps": 1, "batch_size": 7, "model.gradient_checkpointing": "true"}
    finetune(inputs, tmp_path / "run", **BARE | changes)
    assert len(seen) == 2 * 2  # layers, each run again in the backward pass
    texts = [json.loads(line)["text"] for line in (inputs / "train.jsonl").read_text().splitlines()]
    borders = {*accumulate(len(text) + 1 for text in texts)} & set(range(7 * 64)) | set(range(0, 7 * 64, 64))
    assert len(borders) > 7 + 8
    # blocks are shuffled: the lengths of their pieces are what does not change
    lengths = sorted(b - a for a, b in pairwise(sorted(borders | {7 * 64})))
    for cu_seqlens in seen:
        assert sorted(cu_seqlens.diff().tolist()) == lengths


def test_accumulation_equals_a_larger_batch(inputs, tmp_path):
    changes = BARE | {"data.train.path": inputs / "train.txt"} | {"data.train.blocks": 8, "steps": 3}
    finetune(inputs, tmp_path / "two", **changes, batch_size=2, accumulation_steps=2)
    finetune(inputs, tmp_path / "four", **changes, batch_size=4, accumulation_steps=1)
    for two, four in zip(log(tmp_path / "two"), log(tmp_path / "four"), strict=True):
        assert two["loss"] == pytest.approx(four["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(four["grad_norm"], rel=1e-3)
        assert two["tokens"] == four["tokens"]


def test_the_control_run_trains_through_original_attention(inputs, tmp_path, monkeypatch):
    finetune(inputs, tmp_path / "fp4", **BARE)

    attention = transformers_attention.attention

    def refuse(*args, **kwargs):
        # An export is tried out in 4 bits whatever it was trained through.
        assert not torch.is_grad_enabled(), "4-bit attention ran"
        return attention(*args, **kwargs)

    monkeypatch.setattr(transformers_attention, "attention", refuse)
    with pytest.raises(AssertionError, match="4-bit attention ran"):
        finetune(inputs, tmp_path / "spy", **BARE)
    finetune(inputs, tmp_path / "control", **BARE, attention="original")
    # The backward pass runs the forward pass again: through original attention, too.
    finetune(inputs, tmp_path / "checkpointing", **BARE, attention="original", **{"model.gradient_checkpointing": "true"})
    assert_same_run(tmp_path / "control", tmp_path / "checkpointing")
    losses = [log(tmp_path / name)[0]["loss"] for name in ("control", "fp4")]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


def test_gradients_are_clipped_once_a_step(inputs, tmp_path, monkeypatch):
    # Plain gradient descent moves by learning rate times gradient; Adam would hide the clipping.
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **options: torch.optim.SGD(parameters, lr))
    calls, clip = [], Accelerator.clip_grad_norm_
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args: calls.append(args) or clip(*args))
    start = weights(inputs / "model")
    for name, limit in (("clipped", 0.5), ("free", "null")):
        calls.clear()
        finetune(inputs, tmp_path / name, **BARE | {"steps": 1}, learning_rate=0.1, max_grad_norm=limit)
        end, (record,) = weights(tmp_path / name / "export"), log(tmp_path / name)
        moved = sum((end[key].double() - start[key].double()).square().sum() for key in start).sqrt().item()
        assert record["grad_norm"] > 1 and len(calls) == 1
        assert moved == pytest.approx(0.1 * (0.5 if limit == 0.5 else record["grad_norm"]), rel=1e-3)


def test_mixed_precision_keeps_float32_weights(inputs, tmp_path, monkeypatch):
    dtypes, attention = set(), transformers_attention.attention

    def spy(q, k, v, **kwargs):
        if torch.is_grad_enabled():  # not the export, which computes in the types of the weights
            dtypes.add(q.dtype)
        return attention(q, k, v, **kwargs)

    monkeypatch.setattr(transformers_attention, "attention", spy)
    finetune(
        inputs, tmp_path / "run", **BARE | {"checkpoint_every": 2}, mixed_precision="bf16", **{"model.export_dtype": "bfloat16"}
    )
    assert dtypes == {torch.bfloat16}
    saved = tmp_path / "run" / "checkpoint-2"
    assert {tensor.dtype for tensor in weights(saved).values()} == {torch.float32}
    moments = torch.load(saved / "optimizer.bin")["state"][0]
    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32
    assert {tensor.dtype for tensor in weights(tmp_path / "run" / "export").values()} == {torch.bfloat16}


def test_training_goes_on_from_an_export(reference, inputs, tmp_path):
    finetune(inputs, tmp_path / "run", **BARE, **{"model.path": reference / "export", "qat.spec.preset": "nvfp4_qk"})
    assert log(tmp_path / "run")[0]["loss"] < log(reference)[1]["loss"] - 0.5
    handle = get_handle(load_checkpoint(tmp_path / "run" / "export"))
    assert {layer.spec.preset for layer in handle.patched.values()} == {"nvfp4_qk"}


@pytest.mark.filterwarnings("ignore:.*no supported trackers")
def test_data_and_launches_that_do_not_fit_are_refused(inputs, tmp_path, monkeypatch):
    for changes, message in (
        ({"batch_size": 8}, "there are 7 samples to train on, and batch_size is 8"),
        ({"data.sequence_length": 10**6, "data.train.blocks": ...}, "do not fill one block of 1000000 tokens"),
        ({"qat.include": "['*.9.*']"}, r"the pattern '\*\.9\.\*' matches no attention module"),
        ({"report_to": "[nowhere]"}, "nowhere"),
        ({"model.path": tmp_path}, "expected the folder of a language model, got no config.json there"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune(inputs, tmp_path / "run", **changes)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ValueError, match="report_to: tensorboard cannot be used here"):
        finetune(inputs, tmp_path / "run", report_to="[tensorboard]")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="accelerate launch asks for bf16, the settings for mixed_precision=no"):
        finetune(inputs, tmp_path / "run")
    for name in ("DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=f"launch asks for {name}, which this loop"):
            patch.setenv(f"ACCELERATE_USE_{name}", "true")
            finetune(inputs, tmp_path / "run")
    assert not (tmp_path / "run").exists()
