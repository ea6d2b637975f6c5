"""The positions of queries among the keys come from the model, never from the lengths."""

import itertools
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AttentionMaskInterface, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.masking_utils import causal_mask_function

from qat_patch import AttnQATConfig, patch_model
from qat_patch.hosts.transformers import masks
from support.families import every_causal_lm
from support.families.families import relative
from support.models.tiny_qwen3 import logits, pad, tiny_llama, tiny_qwen3, token_ids

CACHE = "cache" if "cache" in tiny_qwen3(num_hidden_layers=1).forward.__code__.co_varnames else "past_key_values"


@pytest.mark.parametrize("kept", [1, 2, 9])
@pytest.mark.parametrize("padding", [0, 5])
def test_models_that_keep_the_last_queries_only(kept, padding):
    """Gemma 4 with shared keys and values, and logits_to_keep: these layers see the last queries, and a mask cut to them."""
    model = every_causal_lm.build("gemma4_text")
    ids, mask = pad(token_ids() % 97 + 3, padding, "left")
    stock = logits(model, ids, attention_mask=mask, logits_to_keep=kept)
    handle = patch_model(model, AttnQATConfig(include=["*.1.self_attn", "*.3.self_attn"]))
    whole = logits(model, ids, attention_mask=mask)[:, -kept:]
    assert relative(logits(model, ids, attention_mask=mask, logits_to_keep=kept), whole) < 1e-9
    assert relative(whole, stock) > 1e-3
    with handle.disabled():
        assert torch.equal(logits(model, ids, attention_mask=mask, logits_to_keep=kept), stock)


@pytest.mark.parametrize(("build", "compiled"), [(tiny_qwen3, False), (tiny_llama, False), (tiny_qwen3, True)])
def test_padding_in_front_takes_no_positions(build, compiled):
    """Rotary embeddings turn Q and K before they are quantized. Without position_ids the host counts padding."""
    model, ids = build(torch.float64, **{"num_hidden_layers": 1} if compiled else {}), token_ids(length=30)
    padded, mask = pad(ids, 9, "left")
    padded[0, 4:9], mask[0, 4:9] = token_ids(1, 5, seed=7), 1
    stock = logits(model, padded, attention_mask=mask)
    handle = patch_model(model)
    expected = torch.cat([logits(model, padded[:1, 4:])[:, 5:], logits(model, ids[1:])])
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    assert relative(logits(run, padded, attention_mask=mask)[:, 9:], expected) < 1e-9
    assert relative(logits(run, inputs_embeds=model.get_input_embeddings()(padded), attention_mask=mask)[:, 9:], expected) < 1e-9
    assert relative(stock[:, 9:], expected) > 1e-3
    # those that are passed count
    counted = torch.arange(39).expand(2, -1)
    assert relative(logits(run, padded, attention_mask=mask, position_ids=counted)[:, 9:], expected) > 1e-3
    with handle.disabled():
        assert torch.equal(logits(model, padded, attention_mask=mask), stock)
    torch._dynamo.reset()


def test_padding_in_front_is_counted_on_a_cache_too():
    model, (padded, mask) = tiny_qwen3(torch.float64), pad(token_ids(length=30), 9, "left")
    handle = patch_model(model)
    whole = logits(model, padded, attention_mask=mask)
    cache = handle.cache()
    parts = [(0, 20), (20, 21), (21, 39)]
    found = [logits(model, padded[:, a:b], attention_mask=mask[:, :b], **{CACHE: cache, "use_cache": True}) for a, b in parts]
    assert relative(torch.cat(found, 1)[:, 9:], whole[:, 9:]) < 1e-9


def test_learned_positions_stay_those_of_the_host():
    """There padding in front changes what the stock model says too."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_head=4, n_layer=1, vocab_size=128, attn_pdrop=0.0)).eval().double()
    padded, mask = pad(token_ids(length=30), 9, "left")
    patch_model(model)
    counted = torch.arange(39).expand(2, -1)
    assert torch.equal(
        logits(model, padded, attention_mask=mask), logits(model, padded, attention_mask=mask, position_ids=counted)
    )


@pytest.mark.parametrize("exclude", [[], ["*.1.*"]])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_static_cache_filled_piece_by_piece(exclude, implementation, padding):
    """Also in layers that are left out: their masks count the slots that are still empty."""
    model = tiny_qwen3(torch.float64)
    model.set_attn_implementation(implementation)
    ids, mask = pad(token_ids(), padding, "left")
    patch_model(model, AttnQATConfig(exclude=exclude))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = logits(model, ids, attention_mask=mask, position_ids=positions)
    cache, found = StaticCache(config=model.config, max_cache_len=70), []
    for start, stop in itertools.pairwise((0, 20, 21, 22, ids.shape[1])):
        pieces = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop], CACHE: cache}
        found.append(logits(model, ids[:, start:stop], **pieces))
    real = mask.bool()
    assert relative(torch.cat(found, 1)[real], whole[real]) < 1e-9


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.parametrize(("queries", "before", "empty"), [(7, 0, 0), (7, 0, 4), (3, 5, 0), (3, 5, 4), (1, 6, 0), (1, 6, 4)])
@pytest.mark.parametrize("padding", [0, 2])
def test_compact_masks_become_what_the_host_makes(original, queries, before, empty, padding):
    filled = queries + before
    given = torch.ones(2, filled, dtype=torch.bool)
    given[0, :padding] = False
    arguments = {"batch_size": 2, "q_length": queries, "kv_length": filled + empty, "q_offset": before, "attention_mask": given}
    arguments |= {"mask_function": causal_mask_function, "dtype": torch.float32}
    arguments |= {"allow_is_causal_skip": not (empty and queries == 1)}
    compact = masks.make_mask(**arguments, original=original)
    assert masks.is_compact(compact) and compact.untyped_storage().nbytes() <= 2 * filled
    causal = masks.read(compact, queries, filled + empty, from_the_first=True)
    assert causal.filled == filled and (causal.key_mask is None) == (padding == 0)
    expected = AttentionMaskInterface()[original](**arguments)
    found = masks.restore(compact, original, filled + empty, torch.float32)
    assert (found is None and expected is None) or torch.equal(found, expected)
    # The last rows of a compact mask are the mask of the last queries.
    cut = masks.restore(compact[:, :, -1:], "eager", filled + empty, torch.float32)
    assert torch.equal(cut, AttentionMaskInterface()["eager"](**arguments)[:, :, -1:])


def test_a_mask_is_not_read_while_a_cuda_graph_is_captured(monkeypatch):
    """Fake tensors, too, stop whoever asks for their values. What is replayed may have padding, so the mask says all of it."""
    make = partial(masks.make_mask, 2, 6, 6, mask_function=causal_mask_function)
    with FakeTensorMode():
        given = torch.ones(2, 6, dtype=torch.bool)
        with pytest.raises(DataDependentOutputException):
            make(attention_mask=given)
        monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
        assert make(attention_mask=given).dtype == masks.PADDED
    given = torch.tensor([[False] * 2 + [True] * 4, [True] * 6])
    assert torch.equal(masks.read(make(attention_mask=given), 6, 6, from_the_first=True).key_mask, given)
    assert masks.read(make(), 6, 6, from_the_first=True).key_mask is None


def test_a_missing_mask_says_nothing_about_positions():
    assert masks.read(None, 5, 5, from_the_first=True).filled == 5 and masks.read(None, 1, 9, from_the_first=True).filled == 9
    with pytest.raises(ValueError, match="no mask for 5 queries and 9 keys: expected one that says where the queries are"):
        masks.read(None, 5, 9, from_the_first=True)


@pytest.mark.parametrize("compute", [torch.add, torch.where, torch.nn.functional.scaled_dot_product_attention])
def test_code_that_does_not_know_a_compact_mask_fails(compute):
    for given in (None, torch.tensor([[False] + [True] * 5] * 2)):
        mask = masks.make_mask(2, 6, 6, mask_function=causal_mask_function, attention_mask=given)
        query = torch.randn(2, 4, 6, 16)
        scores = query @ query.mT
        arguments = {torch.add: (scores, mask), torch.where: (mask, scores, scores)}.get(compute, (query, query, query, mask))
        with pytest.raises(RuntimeError):
            compute(*arguments)


def test_plain_text_in_a_model_that_knows_pictures():
    """Gemma 3 asks for token_type_ids to train, all 0 in text. Those of pictures are in test_windows.py."""
    model = every_causal_lm.build("gemma3")
    patch_model(model, AttnQATConfig(include=["*language_model.layers.1.self_attn"]))
    ids = token_ids() % 97 + 3
    assert torch.equal(logits(model, ids, token_type_ids=torch.zeros_like(ids)), logits(model, ids))
