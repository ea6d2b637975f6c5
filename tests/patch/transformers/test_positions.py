"""Where queries stand among the keys is what the model says, never what lengths suggest."""

import itertools

import pytest
import torch
from transformers import AttentionMaskInterface, StaticCache
from transformers.masking_utils import causal_mask_function

from qat_patch import AttnQATConfig, patch_model
from qat_patch.hosts.transformers import masks
from support.families import every_causal_lm
from support.families.families import relative
from support.models.tiny_qwen3 import logits, pad, tiny_qwen3, token_ids

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


def test_no_mask_is_no_position():
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
