"""`generate` with the FP4 cache: token for token what the patched model generates without any cache, in float64."""

import pytest
import torch

from qat_kernels import QuantSpec
from qat_patch import AttnQATConfig, patch_model
from support.models.tiny_qwen3 import pad, tiny_llama, tiny_qwen3, token_ids


def generate(model, ids, steps=40, **kwargs):
    return model.generate(ids, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0, **{"do_sample": False} | kwargs)


@pytest.mark.parametrize("build", [tiny_qwen3, tiny_llama])
def test_equals_full_recomputation_also_with_left_padding(build):
    model, ids = build(torch.float64), token_ids(length=21)
    handle = patch_model(model)
    full = generate(model, ids, use_cache=False)
    assert torch.equal(generate(model, ids, past_key_values=handle.cache()), full)
    padded, mask = pad(ids, 9, "left")
    padded[0, :9], mask[0, :9] = token_ids(1, 9, seed=5), 1  # a longer row beside a shorter one
    full = generate(model, padded, attention_mask=mask, use_cache=False)
    cache = handle.cache()
    assert torch.equal(generate(model, padded, attention_mask=mask, past_key_values=cache), full)
    assert cache.get_seq_length() == 30 + 40 - 1


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
def test_ways_to_generate(options):
    """Beams reorder the cache, lookup crops what was guessed wrongly, chunks continue it by several tokens."""
    model = tiny_qwen3(torch.float64)
    ids = token_ids(batch=1, length=7).repeat(1, 5)  # repeats itself, so that lookup finds guesses
    handle = patch_model(model)
    torch.manual_seed(0)
    expected = generate(model, ids, **options)
    torch.manual_seed(0)
    assert torch.equal(generate(model, ids, past_key_values=handle.cache(), **options), expected)


def test_a_conversation_goes_on_with_the_same_cache():
    model, ids = tiny_qwen3(torch.float64), token_ids(length=21)
    handle = patch_model(model)
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


def test_batches_are_selected_and_repeated():
    model, ids = tiny_qwen3(torch.float64), token_ids(batch=3, length=30)
    handle = patch_model(model)
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
    other = patch_model(tiny_qwen3(), AttnQATConfig(spec=QuantSpec(pv="bf16")))
    with pytest.raises(ValueError, match="V stays in BF16"):
        other.cache()
