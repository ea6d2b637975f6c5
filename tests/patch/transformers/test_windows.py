"""Sliding windows, chunks, soft caps and sinks of language models: the float64 oracle is in test_every_causal_lm.py."""

import copy
import inspect
import itertools

import pytest
import torch
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, GptOssConfig, GptOssForCausalLM, masking_utils

from qat_patch import AttnQATConfig, QuantSpec, calibrate, export_checkpoint, get_handle, load_checkpoint, patch_model
from qat_patch.hosts.transformers import masks
from support.families import every_causal_lm
from support.families.families import lively, relative
from support.models.tiny_qwen3 import logits, pad, tiny_qwen3, token_ids

WINDOWED = ["mistral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text"]
LENGTH = 100


@pytest.fixture(scope="module")
def models():
    """Built once: deep copies are to be changed."""
    return {model_type: every_causal_lm.build(model_type) for model_type in WINDOWED}


def in_parts(model, ids, ends, mask=None, cache=None):
    """The logits of all tokens, which come in several passes over one cache."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    found = []
    for start, stop in itertools.pairwise((0, *ends, ids.shape[1])):
        given = {} if cache is None else {name: cache}
        given |= {} if mask is None else {"attention_mask": mask[:, :stop]}
        with torch.no_grad():
            out = model(ids[:, start:stop], use_cache=True, **given)
        cache = out[name]
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("ends", [(23, 40, 41, 60, 61, 62), (70, *range(71, LENGTH))], ids=["in pieces", "token by token"])
@pytest.mark.parametrize("model_type", WINDOWED)
def test_tokens_on_a_cache_long_after_the_window(models, model_type, ends, padding):
    """Groups of 16 keys, whose V shares a scale, count from the first token, and a cache drops tokens before a window."""
    model = copy.deepcopy(models[model_type])
    ids, mask = pad(token_ids(length=LENGTH) % 97 + 3, padding, "left")
    handle = patch_model(model)
    whole = logits(model, ids, attention_mask=mask, use_cache=False)
    real = mask.bool()
    for cache in (None, handle.cache()):
        assert relative(in_parts(model, ids, ends, mask, cache)[real], whole[real]) < 1e-6  # Llama 4 has a part in float32


def test_a_cache_keeps_whole_groups_and_no_more(models):
    model = copy.deepcopy(models["mistral"])
    patch_model(model)
    cache = DynamicCache(config=model.config)
    in_parts(model, token_ids(length=LENGTH) % 97 + 3, (50,), cache=cache)
    kept = {layer.keys.shape[2] for layer in cache.layers}
    assert kept == {model.config.sliding_window - 1 + masks.BEFORE_A_WINDOW}
    with get_handle(model).disabled():
        in_parts(model, token_ids(length=30) % 97 + 3, (20,), cache=copy.deepcopy(cache))  # original attention reads it too


def test_a_cache_that_has_dropped_tokens_is_refused(models):
    model, ids = copy.deepcopy(models["mistral"]), token_ids(length=40) % 97 + 3
    handle, cache = patch_model(model), DynamicCache(config=model.config)
    with handle.disabled():
        in_parts(model, ids, (39,), cache=cache)
    with pytest.raises(ValueError, match="this cache has dropped tokens before a sliding window"):
        in_parts(model, ids, (), cache=cache)
    short = DynamicCache(config=model.config)
    with handle.disabled():  # all tokens are there
        first = in_parts(model, ids[:, : model.config.sliding_window - 1], (), cache=short)
    assert first.isfinite().all() and in_parts(model, ids, (), cache=short).isfinite().all()


def test_stock_layers_beside_patched_ones(models):
    """Their cache keeps more than they see, and the masks of their windows count that."""
    model, ids = copy.deepcopy(models["mistral"]), token_ids(length=LENGTH) % 97 + 3
    for layer in (0, 1):
        each = copy.deepcopy(model)
        patch_model(each, AttnQATConfig(include=[f"*.{layer}.self_attn"]))
        whole = logits(each, ids, use_cache=False)
        assert relative(whole, logits(models["mistral"], ids, use_cache=False)) > 1e-4
        assert relative(in_parts(each, ids, (50, 51, 80)), whole) < 1e-9


@pytest.mark.parametrize("model_type", ["gemma2", "gpt_oss", "llama4_text"])
def test_what_is_read_from_an_export_computes_the_same(models, model_type, tmp_path):
    model, ids = copy.deepcopy(models[model_type]).float(), token_ids(length=60) % 97 + 3
    patch_model(model)
    expected = logits(model, ids, use_cache=False)
    export_checkpoint(model, tmp_path / "out")
    assert torch.equal(logits(load_checkpoint(tmp_path / "out"), ids, use_cache=False), expected)


def test_tokens_before_the_window_change_nothing(calls):
    model = tiny_qwen3(torch.float64, num_hidden_layers=1, use_sliding_window=True, sliding_window=16, max_window_layers=0)
    patch_model(model)
    ids = token_ids(length=80)
    changed = ids.clone()
    changed[:, :32] = (ids[:, :32] + 1) % 97 + 3
    a, b = logits(model, ids, use_cache=False), logits(model, changed, use_cache=False)
    assert calls[0]["window"] == 16
    # The window of token 63 begins with a group, at 48.
    assert torch.equal(a[:, 63:], b[:, 63:]) and not torch.equal(a[:, 40], b[:, 40])


def test_sinks_are_trained(models):
    model, ids = copy.deepcopy(models["gpt_oss"]), token_ids(length=40) % 97 + 3
    patch_model(model)
    model(ids, use_cache=False, labels=ids).loss.backward()
    gradients = [layer.self_attn.sinks.grad for layer in model.model.layers]
    assert all(x.isfinite().all() and x.abs().min() > 0 for x in gradients)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GptOssForCausalLM(GptOssConfig(**SIZES)),
            "attention sinks, which the servers of preset='kv_nvfp4' do not compute",
        ),
        (
            lambda: GptOssForCausalLM(GptOssConfig(**SIZES)),
            "a sliding window, which the servers of preset='fa4_fp4' do not compute",
        ),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), "a soft cap of the scores, which the servers of preset='fa4_fp4'"),
    ],
)
def test_what_servers_do_not_compute_is_refused_when_a_model_is_patched(make, message):
    preset = "kv_nvfp4" if "kv_nvfp4" in message else "fa4_fp4"
    with pytest.raises(ValueError, match=message):
        patch_model(make(), AttnQATConfig(spec=QuantSpec(preset=preset)))


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 32,
    "vocab_size": 128,
    "num_local_experts": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def test_modules_with_a_cap_get_a_q_shift_only():
    model, ids = lively(Gemma2ForCausalLM(Gemma2Config(**SIZES))).eval(), token_ids(length=20)
    handle = patch_model(model)
    with pytest.raises(ValueError, match=r"calibrate: model\.layers\.0\.self_attn has a soft cap of the scores"):
        calibrate(model, [ids], shifts=("k_shift",))
    assert not any(handle.shifts.values())
    before = logits(model, ids)
    calibrate(model, [ids])
    assert list(handle.q_shift) == list(handle.patched) and not handle.k_shift
    assert not torch.equal(logits(model, ids), before)


def test_a_mask_with_another_window_than_the_module_asks_for_is_refused(models):
    model, ids = copy.deepcopy(models["gemma3_text"]), token_ids(length=40) % 97 + 3
    patch_model(model)
    for layer in model.model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 20
    with pytest.raises(ValueError, match="the module asks for a sliding window of 20 keys, and its mask has 12"):
        logits(model, ids, use_cache=False)


@pytest.mark.parametrize("chunk", [16, 24])
def test_chunks_see_themselves_alone(models, chunk):
    """A chunk of a prompt is computed as if it were the whole."""
    model = copy.deepcopy(models["llama4_text"])
    model.config.attention_chunk_size = chunk
    kinds = model.config.layer_types
    model.model.layers = torch.nn.ModuleList([model.model.layers[kinds.index("chunked_attention")]])
    model.config.num_hidden_layers, model.config.layer_types = 1, ["chunked_attention"]
    handle = patch_model(model)
    seen = []
    with handle.observed(lambda layer, call: seen.append((call.query.shape[2], call.key.shape[2]))):
        logits(model, token_ids(batch=1, length=60) % 97 + 3, use_cache=False)
    assert seen == [(chunk, chunk)] * (60 // chunk) + [(60 % chunk, 60 % chunk)]


def with_image(length, *spans):
    """token_type_ids: 1 for the tokens of pictures."""
    types = torch.zeros(2, length, dtype=torch.long)
    for start, stop in spans:
        types[:, start:stop] = 1
    return types


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("spans", [[(7, 30)], [(20, 36), (40, 43)]], ids=["longer than the window", "two pictures"])
@pytest.mark.parametrize("model_type", ["gemma3"])
def test_pictures_see_themselves_both_ways(model_type, spans, padding):
    stock = every_causal_lm.build(model_type)
    ids, mask = pad(token_ids(length=LENGTH // 2) % 97 + 3, padding, "left")
    types = torch.cat([torch.zeros(2, padding, dtype=torch.long), with_image(LENGTH // 2, *spans)], 1)
    model, real = copy.deepcopy(stock), mask.bool()
    handle = patch_model(model)
    found = logits(model, ids, attention_mask=mask, token_type_ids=types, use_cache=False)
    assert relative(found[real], logits(model, ids, attention_mask=mask, use_cache=False)[real]) > 1e-3
    expected = every_causal_lm.reference(copy.deepcopy(stock), list(handle.patched), ids, mask, token_type_ids=types)
    assert relative(found[real], expected[real]) < 1e-6
    with handle.disabled():
        expected = logits(stock, ids, attention_mask=mask, token_type_ids=types, use_cache=False)
        assert torch.equal(logits(model, ids, attention_mask=mask, token_type_ids=types, use_cache=False), expected)
    # Layers that are left out get masks of the host.
    half = copy.deepcopy(stock)
    handle = patch_model(half, AttnQATConfig(include=["*.0.self_attn"]))
    found = logits(half, ids, attention_mask=mask, token_type_ids=types, use_cache=False)
    expected = every_causal_lm.reference(copy.deepcopy(stock), list(handle.patched), ids, mask, token_type_ids=types)
    assert relative(found[real], expected[real]) < 1e-6


def test_text_after_a_picture_on_a_cache():
    model = every_causal_lm.build("gemma3")
    ids, types = token_ids(length=60) % 97 + 3, with_image(60, (7, 30))
    patch_model(model)
    whole = logits(model, ids, token_type_ids=types, use_cache=False)
    with torch.no_grad():
        out = model(ids[:, :40], token_type_ids=types[:, :40], use_cache=True)
        found = [out.logits]
        for token in range(40, 60):
            out = model(ids[:, token : token + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    assert relative(torch.cat(found, 1), whole) < 1e-9


def test_a_picture_in_two_parts_is_refused():
    """What its tokens see is no interval."""
    assert masks.is_compact(masks.make_mask(1, 5, 5, mask_function=masks_of_blocks([[0, 0, -1, 1, 1]])))
    function = masks_of_blocks([[0, 0, -1, 0, 0]])
    mask = masks.make_mask(1, 5, 5, mask_function=function, allow_is_causal_skip=False)
    with pytest.raises(ValueError, match="unsupported mask"):
        masks.read(mask, 5, 5, from_the_first=True)


def masks_of_blocks(ids):
    return masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.blockwise_overlay(torch.tensor(ids)))
