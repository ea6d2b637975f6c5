"""Patched language models token by token: causality, padding, and generation with the caches of transformers."""

import pytest
import torch

from qat_patch import patch_model
from support.families.families import relative
from support.models.tiny_qwen3 import VOCAB, logits, pad, tiny_qwen3, token_ids


@pytest.mark.parametrize("position", [10, 33, 49])
def test_future_tokens_change_nothing(position):
    model, ids = tiny_qwen3(), token_ids()
    patch_model(model)
    changed = ids.clone()
    changed[:, position:] = (changed[:, position:] + 7) % VOCAB
    assert torch.equal(logits(model, ids)[:, :position], logits(model, changed)[:, :position])
    assert not torch.equal(logits(model, ids)[:, position:], logits(model, changed)[:, position:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, calls):
    model, ids = tiny_qwen3(torch.float64), token_ids()
    patch_model(model)
    padded, mask = pad(ids, 7, side)
    real = slice(7, None) if side == "left" else slice(0, 50)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate does; rotated keys are quantized keys
    out = logits(model, padded, attention_mask=mask, position_ids=positions)[:, real]
    assert relative(out, logits(model, ids)) < 1e-9
    assert calls[0]["key_mask"].shape == (2, 57)
    assert calls[-1]["key_mask"] is None
    # an all-ones mask is no mask
    calls.clear()
    logits(model, ids, attention_mask=torch.ones_like(ids))
    assert all(call["key_mask"] is None for call in calls)


def greedy(model, ids, steps, **kwargs):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, pad_token_id=0, **kwargs)


def test_generation_with_a_cache_equals_full_recomputation_in_float64(calls):
    model, ids = tiny_qwen3(torch.float64), token_ids(length=21)
    patch_model(model)
    full = greedy(model, ids, 40, use_cache=False)
    assert torch.equal(greedy(model, ids, 40), full)
    assert {call["q"].shape[2] for call in calls[-60:]} == {1}
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(greedy(model, ids, 40, **static), full)
    padded, mask = pad(ids, 9, "left")
    for options in ({}, static):
        assert torch.equal(greedy(model, padded, 40, attention_mask=mask, **options)[:, 9:], full)


def test_cached_generation_agrees_teacher_forced_in_float32():
    model, ids = tiny_qwen3(), token_ids(batch=4, length=20)
    patch_model(model)
    tokens = greedy(model, ids, 60)
    full = logits(model, tokens[:, :-1])[:, 19:]
    cached, cache = [], None
    with torch.no_grad():
        for position in range(19, tokens.shape[1] - 1):
            inputs = tokens[:, : position + 1] if cache is None else tokens[:, position : position + 1]
            step = model(inputs, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            cached.append(step.logits[:, -1])
    agreement = (torch.stack(cached, 1).argmax(-1) == full.argmax(-1)).double().mean().item()
    assert agreement >= 0.98


def test_continuation_of_several_tokens_on_a_cache():
    model, ids = tiny_qwen3(torch.float64), token_ids()
    patch_model(model)
    full = logits(model, ids)
    for options in ({}, {"attention_mask": torch.ones_like(ids)}):
        with torch.no_grad():
            head = model(ids[:, :30], use_cache=True)
            tail = model(ids[:, 30:], past_key_values=head.past_key_values, **options)
        assert relative(torch.cat((head.logits, tail.logits), 1), full) < 1e-9
