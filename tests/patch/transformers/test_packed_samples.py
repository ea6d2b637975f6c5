"""Packed samples on Transformers language models: as if each were alone, and refused where that cannot be."""

import copy

import pytest
import torch
from transformers import DataCollatorWithFlattening

from qat_patch import AttnQATConfig, patch_model
from qat_patch.hosts.transformers import masks, packed_samples
from support.families import every_causal_lm
from support.families.families import relative
from support.models.tiny_qwen3 import VOCAB, checkpoint_activations, tiny_llama, tiny_qwen3, token_ids

LENGTHS = (20, 1, 33, 16)
SAMPLES = [token_ids(1, length, seed=length)[0] for length in LENGTHS]


def pack(*samples, cu_seq_lens=False, seq_idx=False):
    """A batch of one row, as transformers' own collator makes it."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=cu_seq_lens, return_seq_idx=seq_idx)
    return collator([{"input_ids": sample.tolist()} for sample in samples]) | {"use_cache": False}


def logits(model, **inputs):
    inputs.pop("labels", None)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("cu_seq_lens", [False, True])
@pytest.mark.parametrize("build", [tiny_qwen3, tiny_llama])
def test_a_pack_equals_its_samples(build, cu_seq_lens, calls):
    model = build(torch.float64)
    patch_model(model)
    packed = logits(model, **pack(*SAMPLES, cu_seq_lens=cu_seq_lens))[0].split(LENGTHS)
    assert len(calls) == model.config.num_hidden_layers
    for call in calls:
        assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_k"].tolist() == [0, 20, 21, 54, 70]
        assert call["max_seqlen_q"] == call["max_seqlen_k"] == 33
        assert call["q"].shape == (70, model.config.num_attention_heads, 32 if build is tiny_qwen3 else 16)
    for sample, result in zip(SAMPLES, packed, strict=True):
        assert relative(result, logits(model, input_ids=sample[None])[0]) < 1e-9
    # several rows of packed samples
    rows = {"input_ids": torch.stack((torch.cat(SAMPLES), torch.cat(SAMPLES[::-1])))}
    rows["position_ids"] = torch.stack([torch.cat([torch.arange(len(x)) for x in order]) for order in (SAMPLES, SAMPLES[::-1])])
    both = logits(model, **rows, use_cache=False)
    assert calls[-1]["cu_seqlens_q"].tolist() == [0, 20, 21, 54, 70, 86, 119, 120, 140]
    assert relative(both[0], torch.cat(packed)) < 1e-9
    reversed_samples = [*both[1].split(LENGTHS[::-1])][::-1]
    assert relative(torch.cat(reversed_samples), torch.cat(packed)) < 1e-9


def test_numbers_of_samples_are_compared_and_change_nothing():
    """`seq_idx`, which TRL passes with every packed batch."""
    model = tiny_qwen3()
    patch_model(model)
    plain, numbered = pack(*SAMPLES, cu_seq_lens=True), pack(*SAMPLES, cu_seq_lens=True, seq_idx=True)
    assert numbered["seq_idx"].shape == (1, 70)
    assert torch.equal(logits(model, **numbered), logits(model, **plain))
    # without position_ids it would say what attention does not do
    with pytest.raises(ValueError, match=r"seq_idx must cut .*expected \[0, 70\], got \[0, 20, 21, 54, 70\]"):
        logits(model, input_ids=numbered["input_ids"], seq_idx=numbered["seq_idx"], use_cache=False)


@pytest.mark.parametrize("cu_seq_lens", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_pack_are_the_sum_of_its_samples(checkpointing, cu_seq_lens):
    model = tiny_qwen3(torch.float64).train()
    patch_model(model)
    if checkpointing:
        checkpoint_activations(model)

    def gradients(*inputs):
        model.zero_grad()
        for each in inputs:
            out = model(**{name: x for name, x in each.items() if name != "labels"}).logits[0]
            out.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    alone = [{"input_ids": sample[None], "use_cache": False} for sample in SAMPLES]
    for a, b in zip(gradients(pack(*SAMPLES, cu_seq_lens=cu_seq_lens)), gradients(*alone), strict=True):
        assert relative(a, b) < 1e-9


def test_nothing_reaches_another_sample():
    model = tiny_qwen3()
    patch_model(model)
    before = logits(model, **pack(*SAMPLES))[0].split(LENGTHS)
    changed = [*SAMPLES]
    changed[2] = (changed[2] + 5) % VOCAB
    after = logits(model, **pack(*changed))[0].split(LENGTHS)
    assert [torch.equal(a, b) for a, b in zip(after, before, strict=True)] == [True, True, False, True]


@pytest.mark.parametrize("cu_seq_lens", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_original_attention_is_bit_equal(implementation, cu_seq_lens, calls):
    """Where the patch is off, and in layers that it leaves out; sdpa and eager of transformers see the samples too."""
    model, inputs = tiny_qwen3(), pack(*SAMPLES, cu_seq_lens=cu_seq_lens)
    model.set_attn_implementation(implementation)
    first = []

    def capture(module, args, output):
        first.append(output[0])

    model.model.layers[0].self_attn.register_forward_hook(capture)
    stock = logits(model, **inputs)
    handle = patch_model(model, AttnQATConfig(exclude=["*.0.*"]))
    with handle.disabled():
        assert torch.equal(logits(model, **inputs), stock)
    assert not calls
    assert not torch.equal(logits(model, **inputs), stock)
    assert len(calls) == 2 and len(first) == 3
    assert torch.equal(first[2], first[0])


def test_one_sample_a_row_is_an_ordinary_batch(calls):
    model, ids = tiny_qwen3(), token_ids(2, 40)
    patch_model(model)
    plain = logits(model, input_ids=ids, use_cache=False)
    ends = torch.tensor([0, 40, 80], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 40, "max_length_k": 40}
    assert torch.equal(logits(model, input_ids=ids, use_cache=False, **lengths), plain)
    assert torch.equal(logits(model, input_ids=ids, **lengths), plain)
    assert all("cu_seqlens_q" not in call and call["q"].ndim == 4 for call in calls)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_cache": True}, "position_ids restart inside a row .packed samples., which needs .*use_cache=False"),
        ({"use_cache": True, "cu_seq_lens_q": None, "cu_seq_lens_k": None}, "position_ids restart inside a row"),
        (
            {"position_ids": None},
            r"cu_seq_lens_q must cut the tokens where position_ids do: expected \[0, 70\], got \[0, 20, 21, 54",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 21, 54, 70])},
            r"cu_seq_lens_q must cut .*expected \[0, 20, 21, 54, 70\], got \[0, 21,",
        ),
        ({"cu_seq_lens_k": torch.tensor([0, 20, 54, 70])}, r"cu_seq_lens_k must cut"),
        ({"cu_seq_lens_k": None}, "missing: cu_seqlens_k"),
        ({"max_length_k": None}, "missing: max_seqlen_k"),
        ({"max_length_q": 5}, "max_seqlen_q: expected the length of the longest document"),
        ({"attention_mask": torch.tensor([[0] * 9 + [1] * 61])}, "cu_seq_lens_q must cut"),
        ({"attention_mask": torch.ones(1, 1, 70, 70, dtype=torch.bool)}, "cu_seq_lens_q must cut"),
        # what looks like the adapter's own compact mask
        ({"attention_mask": torch.ones(1, 3, 70, 70, dtype=masks.SAMPLES)}, "position_ids restart inside a row"),
        (
            {"seq_idx": torch.tensor([[0] * 21 + [1] * 49])},
            r"seq_idx must cut .*expected \[0, 20, 21, 54, 70\], got \[0, 21, 70\]",
        ),
        ({"seq_idx": torch.zeros(2, 70)}, r"seq_idx must cut .*got shape \[2, 70\]"),
        ({"softcap": 30.0}, "softcap"),
    ],
)
def test_packs_that_are_refused(changes, message):
    model = tiny_qwen3()
    patch_model(model)
    inputs = pack(*SAMPLES, cu_seq_lens=True)
    logits(model, **inputs)
    with pytest.raises(ValueError, match=message):
        logits(model, **inputs | changes)


def test_layers_with_a_window_keep_it(calls):
    """Their mask function has packed samples as a part, too."""
    model, inputs = tiny_qwen3(use_sliding_window=True, sliding_window=16, max_window_layers=1), pack(*SAMPLES)
    stock = logits(model, **inputs)
    handle = patch_model(model, AttnQATConfig(include=["model.layers.0.*"]))
    logits(model, **inputs)
    assert len(calls) == 1 and calls[0]["max_seqlen_q"] == 33
    with handle.disabled():
        assert torch.equal(logits(model, **inputs), stock)


def test_compile_without_graph_breaks():
    """The samples come by cu_seq_lens: position_ids cannot be read while tracing."""
    torch._dynamo.reset()
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for samples in (SAMPLES, SAMPLES[:2]):
        inputs = pack(*samples, cu_seq_lens=True)
        assert relative(logits(compiled, **inputs), logits(model, **inputs)) < 1e-6
    with pytest.raises(Exception, match="inside torch.compile pass attention_mask, or cu_seq_lens_q"):
        logits(compiled, **pack(*SAMPLES))
    with pytest.raises(Exception, match="packed samples need"):
        logits(compiled, **pack(*SAMPLES, cu_seq_lens=True) | {"use_cache": True})
    torch._dynamo.reset()


def test_samples_are_found_whichever_layer_is_patched():
    """Twice, for what was refused once has not been checked."""
    model, inputs = tiny_qwen3(torch.float64), pack(*SAMPLES)
    patch_model(model, AttnQATConfig(exclude=["*.0.*"]))
    for _ in range(2):
        with pytest.raises(ValueError, match="position_ids restart inside a row"):
            logits(model, **inputs | {"use_cache": True})
    alone = torch.cat([logits(model, input_ids=sample[None]) for sample in SAMPLES], 1)
    assert relative(logits(model, **inputs), alone) < 1e-9
    with pytest.raises(ValueError, match="position_ids restart inside a row"):
        logits(model, **inputs | {"use_cache": True})


@pytest.mark.parametrize("model_type", ["gpt_bigcode", "persimmon", "ctrl"])
def test_models_that_keep_positions_from_their_layers(model_type):
    """They are read from the arguments of the model."""
    model, inputs = every_causal_lm.build(model_type), pack(*SAMPLES)
    inputs["input_ids"] = inputs["input_ids"] % 97 + 3
    patch_model(model)
    with pytest.raises(ValueError, match="position_ids restart inside a row"):
        logits(model, **inputs | {"use_cache": True})
    alone = torch.cat([logits(model, input_ids=sample[None] % 97 + 3) for sample in SAMPLES], 1)
    assert relative(logits(model, **inputs), alone) < 1e-9


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "minimax", "kimi_linear", "falcon_h1"])
def test_a_state_that_goes_from_sample_to_sample_is_refused(model_type):
    """Whether linear attention and convolutions start again where they are told depends on more than can be seen here."""
    model, samples = every_causal_lm.build(model_type), [sample % 97 + 3 for sample in SAMPLES]
    patch_model(model)
    message = "position_ids restart inside a row .packed samples., and the .* may carry its state from one sample to the next"
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=message):
            logits(each, **pack(*samples))
    # Others of these raise by themselves with 5.24, where there are no kernels for packed samples.
    if model_type == "minimax":
        with pytest.raises(ValueError, match=message):
            logits(model, **pack(*samples, cu_seq_lens=True, seq_idx=True))


def test_inputs_are_compared_once_a_forward_pass(monkeypatch):
    model, inputs = tiny_qwen3(), pack(*SAMPLES, cu_seq_lens=True)
    patch_model(model)
    seen = []
    compare = packed_samples._check
    monkeypatch.setattr(packed_samples, "_check", lambda *args: seen.append(compare(*args)))
    for passes in (1, 2):
        logits(model, **inputs)
        assert len(seen) == passes
