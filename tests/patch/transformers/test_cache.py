"""`generate` with the FP4 cache: token for token what the patched model generates without any cache, in float64."""

import copy
import re

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig
from transformers.models.mllama import modeling_mllama

from qat_kernels import KVCache, QuantSpec
from qat_patch import AttnQATConfig, calibrate, patch_model
from qat_patch.hosts.transformers.cache import FP4Layer, cache_argument
from support.families import every_causal_lm
from support.families.families import lively, relative
from support.models.tiny_qwen3 import pad, tiny_llama, tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_transformer


def generate(model, input_ids, steps=40, **kwargs):
    return model.generate(
        input_ids=input_ids, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0, **{"do_sample": False} | kwargs
    )


EACH_PRESET = pytest.mark.parametrize(
    "config", [AttnQATConfig(spec=QuantSpec(preset=x)) for x in KVCache.presets], ids=KVCache.presets
)


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_llama])
@EACH_PRESET
def test_equals_full_recomputation_also_with_left_padding(build, config):
    model, ids = build(torch.float64), token_ids(length=21)
    handle = patch_model(model, config)
    full = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, past_key_values=handle.cache()), full)
    padded, mask = pad(ids, 9, "left")
    padded[0, :9], mask[0, :9] = token_ids(1, 9, seed=5), 1  # a longer row beside a shorter one
    full = generate(model, padded, attention_mask=mask, use_cache=False)
    cache = handle.cache()
    assert torch.equal(generate(model, padded, attention_mask=mask, past_key_values=cache), full)
    assert cache.get_seq_length() == 30 + 40 - 1
    assert all(isinstance(layer, FP4Layer) for layer in cache.layers)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_with_calibrated_shifts_too(family):
    """Gemma 2 has a soft cap, and so a Q shift only."""
    model, ids = every_causal_lm.build(family), token_ids(length=21) % 97 + 3
    padded, mask = pad(ids, 9, "left")
    handle = patch_model(model)
    calibrate(model, [ids])
    assert len(handle.q_shift) == 2 and len(handle.k_shift) == (2 if family == "qwen3" else 0)
    full = generate(model, padded, attention_mask=mask, use_cache=False)
    cache = handle.cache()
    assert torch.equal(generate(model, padded, attention_mask=mask, past_key_values=cache), full)
    assert all(isinstance(layer, FP4Layer) for layer in cache.layers)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 8},
        {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
    ],
    ids=str,
)
@EACH_PRESET
def test_ways_to_generate(options, config):
    """Beams reorder the cache, lookup crops what was guessed wrongly, chunks continue it by several tokens."""
    model = tiny_qwen3(torch.float64)
    ids = token_ids(batch=1, length=7).repeat(1, 5)  # repeats itself, so that lookup finds guesses
    handle = patch_model(model, config)
    torch.manual_seed(0)
    expected = generate(model, ids, **options)
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids, past_key_values=handle.cache(), **options), expected)


@EACH_PRESET
def test_a_conversation_goes_on_with_the_same_cache(config):
    model, ids = tiny_qwen3(torch.float64), token_ids(length=21)
    handle = patch_model(model, config)
    cache = handle.cache()
    turn = torch.cat((generate(model, ids, 10, past_key_values=cache), token_ids(length=12, seed=4)), 1)
    assert torch.equal(generate(model, turn, 20, past_key_values=cache), generate(model, turn, 20, use_cache=False))
    cache.crop(-30)  # the last turn but one token, to be answered again
    assert torch.equal(generate(model, turn, 20, past_key_values=cache), generate(model, turn, 20, use_cache=False))
    cache.reset()
    assert torch.equal(generate(model, ids, 10, past_key_values=cache), generate(model, ids, 10, use_cache=False))


def test_modules_with_original_attention_keep_an_ordinary_cache():
    model, ids = tiny_qwen3(torch.float64), token_ids(length=21)
    handle = patch_model(model, AttnQATConfig(exclude=["*.1.*"]))
    cache = handle.cache()
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids, use_cache=False))
    assert [layer.keys is None for layer in cache.layers] == [True, False, True]


@EACH_PRESET
def test_batches_are_selected_and_repeated(config):
    model, ids = tiny_qwen3(torch.float64), token_ids(batch=3, length=30)
    handle = patch_model(model, config)
    cache = handle.cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.batch_select_indices(torch.tensor([True, False, True]))
        cache.batch_repeat_interleave(2)
        step = model(ids[[0, 0, 2, 2], :1], past_key_values=cache).logits[:, 0]
        full = model(torch.cat((ids, ids[:, :1]), 1)).logits[:, -1]
    torch.testing.assert_close(step, full[[0, 0, 2, 2]])


def test_what_it_cannot_do_is_refused():
    model, ids = tiny_qwen3(), token_ids()
    handle = patch_model(model)
    with handle.disabled(), torch.no_grad(), pytest.raises(ValueError, match="in an FP4 cache, which original"):
        model(ids, past_key_values=handle.cache())
    with pytest.raises(ValueError, match="no gradient"):
        model(ids, past_key_values=handle.cache())
    with pytest.raises(ValueError, match="negative number, got 3"):
        handle.cache().crop(3)
    with pytest.raises(ValueError, match="offloaded cache of transformers"):
        handle.cache().layers[0].offload()


@pytest.mark.parametrize("preset", ["nvfp4_qk", "kv_nvfp4_fp8", "kv_nvfp4_4over6", "fa4_fp4"])
def test_presets_without_a_cache_are_refused_by_name(preset):
    handle = patch_model(tiny_qwen3(), AttnQATConfig(spec=QuantSpec(preset=preset)))
    with pytest.raises(
        ValueError, match=rf"layers\.0\.self_attn: there is no FP4 cache for preset='{preset}'.*the default cache"
    ):
        handle.cache()


def test_a_module_that_leaves_v_unquantized_keeps_an_ordinary_cache():
    model, ids = tiny_qwen3(torch.float64), token_ids(length=21)
    handle = patch_model(model, AttnQATConfig(overrides={"*.1.self_attn": QuantSpec(preset="nvfp4_qk")}))
    cache = handle.cache()
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids, use_cache=False))
    assert [isinstance(layer, FP4Layer) for layer in cache.layers] == [True, False, True]


def test_each_module_keeps_what_fits_its_preset():
    """K and V by this package's grid, by that of servers, and in transformers' own cache, in one model."""
    model, ids = tiny_qwen3(torch.float64), token_ids(length=21)
    overrides = {"*.1.self_attn": QuantSpec(preset="nvfp4_qk"), "*.2.self_attn": QuantSpec(preset="kv_nvfp4")}
    handle = patch_model(model, AttnQATConfig(overrides=overrides))
    cache = handle.cache()
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids, use_cache=False))
    specs = [layer.packed.spec.preset if isinstance(layer, FP4Layer) else None for layer in cache.layers]
    assert specs == ["nvfp4", None, "kv_nvfp4"]


def test_any_number_of_tokens_can_be_removed_from_a_cache_of_servers():
    """More than the 32 that the other one allows."""
    model, ids = tiny_qwen3(torch.float64), token_ids(length=90)
    handle = patch_model(model, AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4")))
    cache = handle.cache()
    generate(model, ids, 10, past_key_values=cache)
    for kept in (89, 41, 3):
        cache.crop(kept - cache.get_seq_length())
        assert torch.equal(generate(model, ids, 10, past_key_values=cache), generate(model, ids, 10, use_cache=False))


def test_cache_of_servers_is_small():
    model, ids = tiny_qwen3(dtype := torch.bfloat16), token_ids(batch=1, length=600)
    handle = patch_model(model, AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4")))
    cache = handle.cache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids[:, :40], past_key_values=cache)
    config = model.config
    values = 2 * 640 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert sum(layer.packed.nbytes for layer in cache.layers) <= 0.30 * values * dtype.itemsize


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@EACH_PRESET
def test_encoder_decoders(options, config):
    """Self-attention in NVFP4, the keys and values of the encoder's output as they are."""
    sizes = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 128, "dropout": 0.0, "pad_token_id": 0}
    bart = BartConfig(**sizes, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
    torch.manual_seed(0)
    model = lively(BartForConditionalGeneration(bart)).double().eval()
    ids = token_ids(batch=1, length=21)
    without_lookup = {} if "prompt_lookup_num_tokens" in options else options
    if not torch.equal(generate(model, ids, **options), generate(model, ids, **without_lookup, use_cache=False)):
        assert Version(transformers.__version__) < Version("5.24")
        pytest.skip(f"transformers {transformers.__version__} itself goes wrong here, without a patch too")
    handle = patch_model(model, config)
    cache = handle.cache()
    full = generate(model, ids, **without_lookup, use_cache=False)
    assert torch.equal(generate(model, ids, past_key_values=cache, **options), full)
    assert all(isinstance(layer, FP4Layer) for layer in cache.self_attention_cache.layers)
    assert cache.get_seq_length() >= 39


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 8}], ids=str)
@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gpt_oss"])
def test_windows_caps_and_sinks(model_type, options):
    """Windows of 12 keys, in all layers or in every other one; tokens are reordered, and taken back."""
    model = every_causal_lm.build(model_type)
    ids = token_ids(batch=1, length=7).repeat(1, 5) % 97 + 3
    handle = patch_model(model)
    without_lookup = {} if "prompt_lookup_num_tokens" in options or "prefill_chunk_size" in options else options
    expected = generate(model, ids, 20, **without_lookup, use_cache=False)
    cache = handle.cache()
    assert torch.equal(generate(model, ids, 20, past_key_values=cache, **options), expected)
    windows = [layer.packed.window for layer in cache.layers]
    assert windows == {"mistral": [12, 12], "gemma2": [12, None], "gpt_oss": [12, None]}[model_type]
    if "num_beams" in options:
        return
    cache.crop(-30)  # to answer the last turn again
    assert torch.equal(generate(model, ids, 20, past_key_values=cache), generate(model, ids, 20, use_cache=False))


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mistral", AttnQATConfig(exclude=["*.0.self_attn"])),
        ("mistral", AttnQATConfig(exclude=["*.1.self_attn"])),
        ("mistral", AttnQATConfig(overrides={"*.0.self_attn": QuantSpec(preset="nvfp4_qk")})),
        ("gemma2", AttnQATConfig(exclude=["*.0.self_attn"])),
        ("gemma2", AttnQATConfig(exclude=["*.1.self_attn"])),
    ],
    ids=["stock, packed", "packed, stock", "transformers' own, packed", "stock, packed without window", "packed, stock without"],
)
def test_layers_with_a_window_beside_those_of_transformers(model_type, config, padding):
    """One mask serves both, though transformers' own drop tokens: the first one may be of either kind."""
    model = every_causal_lm.build(model_type)
    ids, mask = pad(token_ids(length=70) % 97 + 3, padding, "left")
    handle = patch_model(model, config)
    with torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        for ends in ((23, 40, 41, 42, 70), (*range(60, 71),)):
            cache, start = handle.cache(), 0
            for stop in ends:
                given = {cache_argument(model): cache, "attention_mask": mask[:, :stop]}
                out = model(ids[:, start:stop], **given).logits
                real = mask[:, start:stop].bool()
                # Gemma 2's own attention has a softmax in float32.
                assert relative(out[real], whole[:, start:stop][real]) < (1e-6 if model_type == "gemma2" else 1e-9)
                start = stop
    assert sorted(isinstance(layer, FP4Layer) for layer in cache.layers) == [False, True]


def test_a_mask_with_another_window_than_that_of_the_cache_is_refused():
    model = every_causal_lm.build("mistral")
    handle, ids = patch_model(model), token_ids(length=30) % 97 + 3
    cache = handle.cache()
    for layer in cache.layers:
        layer.window = 20
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match="its FP4 cache is for a sliding window of 20 keys, and its mask has 12"),
    ):
        model(ids, past_key_values=cache)


def test_recurrent_layers_keep_their_state():
    model = every_causal_lm.build("qwen3_next")
    handle, ids = patch_model(model), token_ids(length=21) % 97 + 3
    cache = handle.cache()
    assert torch.equal(generate(model, ids, 10, past_key_values=cache), generate(model, ids, 10, use_cache=False))
    assert [type(layer).__name__ for layer in cache.layers] == ["LinearAttentionLayer", "FP4Layer"]


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", "it uses what a cache returned: key_states, value_states = self.expand_kv"),
        ("mimo_v2_flash", "its keys have 16 elements and its values 32: an FP4 cache holds equal ones"),
        ("jetmoe", "it uses what a cache returned: key_states = key_states.repeat"),
        ("diffllama", "it calls attention more than once"),
        ("falcon_h1", "its place in a cache is a LinearAttentionAndFullAttentionLayer"),
        ("gemma4_text", "it uses what a cache returned: shared_kv_states"),
        ("minimax", "the model has a cache of its own, MiniMaxCache"),
        ("mllama", "the model looks into caches: layer.keys"),
        ("hrm_text", "it shares its place in a cache with another module"),
    ],
)
def test_models_that_do_more_with_a_cache_are_refused_at_once(model_type, reason):
    if model_type == "mllama" and not hasattr(modeling_mllama, "_has_cached_cross_attention_states"):
        pytest.skip(f"transformers {transformers.__version__} has no such code")
    model = every_causal_lm.build(model_type)
    config = AttnQATConfig(include=["*.3.self_attn"]) if model_type == "gemma4_text" else None  # the last ones read what it keeps
    handle = patch_model(model, config)
    with pytest.raises(ValueError, match=r"\.\d\..*: " + re.escape(reason) + ".*generate with the default cache"):
        handle.cache()


def test_a_pass_that_failed_can_be_repeated():
    model, ids = tiny_qwen3(torch.float64), token_ids()
    handle = patch_model(model)
    cache = handle.cache()
    with torch.no_grad():
        want = model(ids).logits[:, 30:]
        model(ids[:, :30], past_key_values=cache)
        with pytest.raises(ValueError, match="softcap is not supported"):
            model(ids[:, 30:], past_key_values=cache, softcap=30.0)
        assert cache.get_seq_length() == 30
        torch.testing.assert_close(model(ids[:, 30:], past_key_values=cache).logits, want)


def test_what_a_cache_returned_is_for_one_call():
    """Calling attention again would add the tokens again."""
    owner = next(iter(patch_model(tiny_qwen3()).patched.values()))
    layer = FP4Layer(owner)
    query, key = torch.randn(1, 4, 5, 32), torch.randn(1, 2, 5, 32)
    incoming, _ = layer.update(key, key)
    incoming.attention(query)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn: attention was called twice with one update"):
        incoming.attention(query)
    assert layer.get_seq_length() == 5


def test_the_name_of_the_argument_is_not_deprecated(recwarn):
    model, ids = tiny_qwen3(), token_ids(length=9)
    handle = patch_model(model)
    generate(model, ids, 3, **{cache_argument(model): handle.cache()})
    assert [str(warning.message) for warning in recwarn if "past_key_values" in str(warning.message)] == []


def test_every_caller_of_generate_gets_the_cache(monkeypatch):
    """Code that is not ours passes none: a PEFT model around the patched one, as TRL calls it, and calls that say otherwise."""
    model, ids = tiny_qwen3(torch.float64), token_ids(length=21)
    handle = patch_model(model)
    full = generate(model, ids, use_cache=False)
    around = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    used = []
    update = FP4Layer.update
    monkeypatch.setattr(FP4Layer, "update", lambda *args, **kwargs: used.append(1) or update(*args, **kwargs))
    with handle.cached():
        assert torch.equal(generate(around, input_ids=ids), full) and len(used) == 3 * 40
        assert torch.equal(generate(model, ids, num_return_sequences=2, do_sample=True, top_k=1), full.repeat_interleave(2, 0))
        for options in ({"use_cache": False}, {"generation_config": GenerationConfig(use_cache=False)}):
            used.clear()
            assert torch.equal(generate(model, ids, **options), full) and not used
        with handle.disabled():
            original = generate(model, ids)
        assert not used
        with pytest.raises(ValueError, match="generate of this Qwen3ForCausalLM has been replaced already"), handle.cached():
            pass
        with pytest.raises(ValueError, match="inside handle.cached.*the copy would never leave"):
            copy.deepcopy(model)
    assert torch.equal(generate(model, ids), full) and not used
    with handle.disabled():
        assert torch.equal(generate(model, ids), original) and not torch.equal(original, full)


def test_what_does_not_generate_has_no_cache():
    for model, message in ((tiny_qwen3().model, "Qwen3Model, which has no generate"), (tiny_transformer(), "a diffusers model")):
        with pytest.raises(ValueError, match=message), patch_model(model).cached():
            pass
    handle = patch_model(tiny_qwen3(), AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4_fp8")))
    with pytest.raises(ValueError, match="there is no FP4 cache for preset='kv_nvfp4_fp8'"), handle.cached():
        pass
