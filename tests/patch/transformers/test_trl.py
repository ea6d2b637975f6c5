"""TRL's trainers, unchanged, with patched models: what they pass to attention, the models that they make, their rollouts."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig

from qat_patch import get_handle, patch_model
from qat_patch.hosts.transformers.cache import FP4Layer
from support.models.tiny_qwen3 import logits
from support.models.tiny_trl import (
    ARGUMENTS,
    chat_tokenizer,
    conversations,
    count_letters,
    load,
    preferences,
    prompts,
    texts,
    write_model,
)

trl = pytest.importorskip("trl", reason="TRL needs Python 3.11")
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


def sft(model, output_dir, data=None, peft_config=None, **arguments):
    arguments = trl.SFTConfig(output_dir=str(output_dir), **ARGUMENTS | arguments)
    data = texts() if data is None else data
    return trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=chat_tokenizer(), peft_config=peft_config)


PACKS = {
    "packing": {"packing": True, "max_length": 64},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free, to a multiple": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 32},
    "packing, answers only": {"packing": True, "max_length": 128, "assistant_only_loss": True},
}


@pytest.mark.parametrize("name", PACKS)
def test_the_loss_of_a_pack_is_that_of_its_samples(name, folder, tmp_path, calls):
    """In float64; TRL sums log-probabilities in float32."""
    model = load(folder, "float64")
    patch_model(model)
    trainer = sft(model, tmp_path, conversations() if "answers" in name else None, **PACKS[name])
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    loss = trainer.compute_loss(model, dict(batch))
    assert all(call["cu_seqlens_q"].tolist() == [*starts, batch["input_ids"].shape[1]] for call in calls)
    total, count = 0.0, 0
    for begin, end in zip(starts, [*starts[1:], None], strict=True):
        ids, labels = (batch[key][:, begin:end] for key in ("input_ids", "labels"))
        scores = logits(model, ids)[0, :-1].log_softmax(-1)
        seen = labels[0, 1:] != -100
        total += scores[seen, labels[0, 1:][seen]].sum()
        count += seen.sum()
    assert len(starts) > 1 and count > 20
    assert loss.item() == pytest.approx((-total / count).item(), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True, "gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}, "packing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "peft_config": LORA},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
        {"assistant_only_loss": True, "peft_config": LORA, "bf16": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_sft_trains_through_4_bit_attention(options, folder, tmp_path, calls):
    model, data = load(folder), conversations() if "assistant_only_loss" in options else None
    patch_model(model)
    trainer = sft(model, tmp_path, data, **options)
    trained = {name: x.detach().clone() for name, x in trainer.model.named_parameters() if x.requires_grad}
    assert bool(trained) and all("lora_" in name for name in trained) == ("peft_config" in options)
    trainer.train()
    assert len(calls) >= 2 * 2 and any(call["q"].requires_grad for call in calls)
    changed = [name for name, x in trainer.model.named_parameters() if x.requires_grad and not torch.equal(x, trained[name])]
    # all but lora_A in the first step, for lora_B is zero then
    assert len(changed) >= len(trained) / 2 and any("q_proj" in name for name in changed)


def dpo(model, output_dir, ref_model=None, peft_config=None, **arguments):
    arguments = trl.DPOConfig(output_dir=str(output_dir), **ARGUMENTS | {"max_steps": 1} | arguments)
    options = {"train_dataset": preferences(), "processing_class": chat_tokenizer(), "peft_config": peft_config}
    return trl.DPOTrainer(model, ref_model, args=arguments, **options)


def first_margin(trainer):
    """Of the rewards, before anything was learned: 0 where the reference is the model that is trained."""
    trainer.train()
    return trainer.state.log_history[0]["rewards/margins"]


def test_the_reference_of_dpo_is_the_model_that_is_trained(folder, tmp_path):
    model = load(folder)
    patch_model(model)
    reference = copy.deepcopy(model)
    assert first_margin(dpo(model, tmp_path, reference)) == 0
    assert get_handle(reference).models == [reference] and get_handle(reference) is not get_handle(model)
    for options in ({"peft_config": LORA}, {"precompute_ref_log_probs": True}):
        model = load(folder)
        patch_model(model)
        assert first_margin(dpo(model, tmp_path, **options)) == pytest.approx(0, abs=1e-6)


def test_a_reference_that_trl_loads_is_patched_or_refused(folder, tmp_path):
    model = load(folder)
    patch_model(model)
    with pytest.raises(ValueError, match="make the trainer first, and patch then.*trainer.ref_model"):
        dpo(model, tmp_path)
    with pytest.raises(ValueError, match="make the trainer first, and patch then"):
        grpo(model, tmp_path, beta=0.1)
    model.save_pretrained(tmp_path / "patched")
    assert first_margin(dpo(load(tmp_path / "patched"), tmp_path)) == 0
    # as the message says
    trainer = dpo(load(folder), tmp_path)
    patch_model(trainer.model)
    assert first_margin(trainer) != 0
    trainer = dpo(load(folder), tmp_path)
    patch_model(trainer.model)
    patch_model(trainer.ref_model)
    assert first_margin(trainer) == 0


def grpo(model, output_dir, peft_config=None, trainer_class=None, **arguments):
    sizes = {"num_generations": 2, "per_device_train_batch_size": 8, "max_completion_length": 60, "max_steps": 1}
    arguments = trl.GRPOConfig(output_dir=str(output_dir), **ARGUMENTS | sizes | arguments)
    options = {"train_dataset": prompts(), "processing_class": chat_tokenizer(), "peft_config": peft_config}
    return (trainer_class or trl.GRPOTrainer)(model, count_letters, args=arguments, **options)


class Watched(trl.GRPOTrainer):
    """Remembers the log-probabilities that the rollouts were sampled with, and those that the trainer computes of them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rolled_out, self.trained = [], []
        generate = type(self.model).generate

        def watched(model, *args, **kwargs):
            scores = []  # of the model, for generate rounds them to float32
            hook = model.register_forward_hook(lambda module, inputs, output: scores.append(output.logits[:, -1]))
            found = generate(model, *args, **kwargs)
            hook.remove()
            completions = found[:, -len(scores) :]
            sampled_with = torch.stack(scores, 1).log_softmax(-1).gather(2, completions[..., None])[..., 0]
            self.rolled_out.append((completions, sampled_with))
            return found

        self.watched = watched

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        found = super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

        def exact():
            scores = logits(model, input_ids, attention_mask=attention_mask, use_cache=False).log_softmax(-1)
            return scores[:, -logits_to_keep - 1 : -1].gather(2, input_ids[:, -logits_to_keep:, None])[..., 0]

        with get_handle(model).disabled():
            original = exact()
        completions, counts = input_ids[:, -logits_to_keep:], attention_mask[:, -logits_to_keep:].bool()
        self.trained.append((completions, counts, found[0].detach(), exact(), original))
        return found


@pytest.mark.parametrize("cache", ["FP4", "default"])
def test_log_probabilities_of_grpo_are_those_of_its_rollouts(cache, folder, tmp_path, monkeypatch):
    """To the last digits, where servers and trainers that quantize differently drift apart (verl #5190, NeMo-RL #1212)."""
    model = load(folder, "float64")
    handle = patch_model(model)
    trainer = grpo(model, tmp_path, trainer_class=Watched)
    monkeypatch.setattr(type(model), "generate", trainer.watched)
    monkeypatch.setattr(FP4Layer, "update", count := Counted(FP4Layer.update))
    with handle.cached() if cache == "FP4" else contextlib.nullcontext():
        trainer.train()
    assert count.calls == (2 * 60 if cache == "FP4" else 0)
    ((sampled, sampled_with),) = trainer.rolled_out
    ((completions, counts, of_trl, exact, original),) = trainer.trained
    # TRL shuffles them.
    pairs = zip(completions, counts, strict=True)
    order = [next(i for i, x in enumerate(sampled) if torch.equal(x[seen], y[seen])) for y, seen in pairs]
    rolled_out = sampled_with[order]
    assert counts.sum() > 200 and not counts.all()  # completions of several lengths, behind prompts of several
    assert (rolled_out - exact)[counts].abs().max() < 1e-9
    assert (rolled_out - of_trl)[counts].abs().max() < 1e-5  # TRL's are float32
    # A trainer in another attention would be off by so much.
    assert (rolled_out - original)[counts].abs().max() > 1e-3


class Counted:
    """A method, and how often it was called."""

    def __init__(self, method):
        self.method, self.calls = method, 0

    def __get__(self, instance, owner):
        def call(*args, **kwargs):
            self.calls += 1
            return self.method(instance, *args, **kwargs)

        return call


@pytest.mark.parametrize(
    "options", [{"peft_config": LORA, "beta": 0.1}, {"gradient_checkpointing": True, "bf16": True}], ids=", ".join
)
def test_grpo_rolls_out_from_the_fp4_cache(options, folder, tmp_path, monkeypatch):
    model = load(folder)
    handle = patch_model(model)
    trainer = grpo(model, tmp_path, max_steps=2, **options)
    monkeypatch.setattr(FP4Layer, "update", count := Counted(FP4Layer.update))
    with handle.cached():
        trainer.train()
    assert count.calls == 2 * 2 * 60
