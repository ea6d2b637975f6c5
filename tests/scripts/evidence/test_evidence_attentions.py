"""The attentions that experiments compare, in tiny models: which one runs, with which mask, and what is left behind."""

import pytest
import torch

import qat_patch
from scripts.evidence.attention import by_name
from scripts.evidence.attention.baseline_attention import baseline_attention
from scripts.evidence.attention.by_name import attention_in
from support.models.tiny_qwen3 import logits, pad, tiny_llama, tiny_qwen3, token_ids
from support.models.tiny_wan import CHANNELS, TEXT_DIM, tiny_transformer


def wan_inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden_states": (1, CHANNELS, 3, 8, 8), "encoder_hidden_states": (1, 512, TEXT_DIM)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} | {"timestep": torch.tensor([300])}


def velocity(model):
    with torch.no_grad():
        return model(**wan_inputs()).sample


def close(a, b, bound=1e-4):
    return (a - b).norm() < bound * b.norm()


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_llama])
def test_a_baseline_in_transformers_equals_the_patch(make, side):
    model, ids, options = make(torch.float64), token_ids(), {}
    if side is not None:
        ids, mask = pad(ids, 7, side)
        mask[0] = 1
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    seen = slice(None) if side is None else options["attention_mask"].bool()
    before = logits(model, ids, **options)
    with attention_in(model, "nvfp4"):
        patched = logits(model, ids, **options)[seen]
    with attention_in(model, "definition") as handle:
        assert close(logits(model, ids, **options)[seen], patched, 1e-9)
        with handle.disabled():
            assert torch.equal(logits(model, ids, **options), before)
        assert close(logits(model, ids, **options)[seen], patched, 1e-9)
    assert torch.equal(logits(model, ids, **options), before)
    assert not close(patched, before[seen], 1e-3)


def test_a_baseline_with_options_equals_the_patch_and_calibrated_means_are_causal(monkeypatch):
    model, ids, calls = tiny_llama(), token_ids(batch=2, length=150), []

    def spy(query, key, value, **options):
        calls.append((query, key, options))
        return baseline_attention(query, key, value, **options)

    def run(name: str, ids=ids) -> torch.Tensor:
        with attention_in(model, name, [{"input_ids": ids[:, :150]}]):
            return logits(model, ids)

    assert close(run("definition+rotate+four_over_six+k_shift"), run("nvfp4+rotate+four_over_six+k_shift"), 1e-3)
    with attention_in(model, "nvfp4+q_shift", [{"input_ids": ids}]) as handle:
        assert handle.q_shift and not handle.k_shift
    monkeypatch.setattr(by_name, "baseline_attention", spy)
    other = torch.cat([ids[:, :100], ids[:, 100:].flip(1)], 1)
    for option, blocks in (("q_shift", [slice(0, 150)]), ("q_shift_by_block", [slice(0, 128), slice(128, 150)])):
        shifted = run(f"definition+k_shift+{option}")
        query, key, options = calls[0]  # what the first layer sees is the same in every attention
        means = torch.stack([query[:, :, block].mean((0, 2)) for block in blocks], 1)
        assert close(options["q_means"], means) and close(options["k_shift"], key.mean((0, 2)))
        with attention_in(model, f"definition+k_shift+{option}", [{"input_ids": ids}]):
            assert torch.equal(logits(model, other)[:, :100], shifted[:, :100])
        calls.clear()
    with pytest.raises(ValueError, match="expected definition with any of .rotate .* got 'definition.shift'"):
        run("definition+shift")
    with (
        pytest.raises(ValueError, match=r"expected batches to calibrate with, got none"),
        attention_in(model, "definition+q_shift"),
    ):
        pass
    with pytest.raises(ValueError, match=r"q_means: expected means for 3 blocks of queries, or one for all, got 2"):
        run("definition+q_shift_by_block", token_ids(length=300))


def test_modules_that_lose_most_are_left_out():
    model, batches = tiny_llama(), [{"input_ids": token_ids()}]
    with attention_in(model, "nvfp4", batches) as handle:
        errors = {layer.name: layer.error for layer in qat_patch.sensitivity(model, batches).layers}
        assert len(handle.patched) == len(errors) > 1
    with attention_in(model, "nvfp4/without_1", iter(batches)) as handle:
        assert set(errors) - set(handle.patched) == {max(errors, key=errors.get)}
    with pytest.raises(ValueError, match="expected a number of modules after /without_, got 'nvfp4/without_some'"):
        by_name.check_name("nvfp4/without_some")


def test_a_baseline_generates_with_a_cache():
    """One query a step, against a key cache, dynamic or static."""
    model, ids = tiny_llama(torch.float64), token_ids(batch=1, length=20)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    with attention_in(model, "definition"):
        expected = model.generate(ids, use_cache=False, **options)
        for cache in (None, "static"):
            assert torch.equal(model.generate(ids, cache_implementation=cache, **options), expected)


def test_a_baseline_in_diffusers_equals_the_patch():
    model, other = tiny_transformer(), tiny_transformer()
    before, stock = velocity(model), model.blocks[0].attn1.processor
    with attention_in(model, "nvfp4"):
        patched = velocity(model)
    with attention_in(model, "definition") as handle:
        assert close(velocity(model), patched)
        assert torch.equal(velocity(other), before)  # another model of the process keeps its attention
        with handle.disabled():
            assert torch.equal(velocity(model), before)
        assert close(velocity(model), patched)
    assert model.blocks[0].attn1.processor is stock
    assert torch.equal(velocity(model), before)
    assert not close(patched, before)


@pytest.mark.parametrize("name", ["sage3", "d_from_o"])
@pytest.mark.parametrize("make", [tiny_qwen3, tiny_transformer])
def test_gradients_flow_through_a_baseline(make, name):
    model = make()
    run = (lambda: model(token_ids()).logits) if make is tiny_qwen3 else (lambda: model(**wan_inputs()).sample)
    gradients = []
    for attention in ("nvfp4", name):
        with attention_in(model, attention):
            loss = run().square().mean()
            gradients.append(
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if g is not None]
                )
            )
    assert not close(gradients[1], gradients[0], 1e-6)
    assert close(gradients[1], gradients[0], 0.9)


def test_options_of_the_definition():
    model, ids = tiny_qwen3(), token_ids()
    with attention_in(model, "nvfp4+rotate+k_shift+four_over_six", [{"input_ids": ids}]) as handle:
        assert {layer.spec for layer in handle.patched.values()} == {qat_patch.QuantSpec(rotate=True, four_over_six=True)}
        assert set(handle.k_shift) == set(handle.patched)
    with attention_in(model, "pv_bf16") as handle:
        assert {layer.spec for layer in handle.patched.values()} == {qat_patch.QuantSpec(preset="nvfp4_qk")}
        assert not handle.k_shift
    before = logits(model, ids)
    with attention_in(model, "original") as handle, handle.disabled():
        assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", ["fp4", "nvfp4+smooth", "nvfp4+rotate+rotate", "original+rotate", "sage3+rotate"])
def test_unknown_names_are_refused(name):
    with (
        pytest.raises(ValueError, match="expected one of original, nvfp4, pv_bf16, preset=kv_nvfp4, .*definition"),
        attention_in(tiny_llama(), name),
    ):
        pass


def test_what_a_baseline_cannot_do_is_refused():
    model = tiny_llama()
    samples = torch.cat([torch.arange(20), torch.arange(30)])[None].expand(2, -1)
    with (
        attention_in(model, "sage3"),
        pytest.raises(ValueError, match="expected causal attention without dropout, windows or packed samples"),
    ):
        model(token_ids(), position_ids=samples, use_cache=False)
    with pytest.raises(ValueError, match="at least one batch"), attention_in(model, "nvfp4+k_shift"):
        pass
    with (
        pytest.raises(ValueError, match="expected a model of transformers or diffusers"),
        attention_in(torch.nn.Linear(2, 2), "sage3"),
    ):
        pass
