"""Families of language models through everything that people do with them, tiny and with the head dims that are published.

In float64, against the stock model and the float64 oracle, to 1e-9. What is published is head counts, head dims and windows; a
window of thousands of keys is a test for -m slow. Hidden sizes and numbers of layers are tiny everywhere.
"""

import copy
import functools
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch

from qat_patch import calibrate, patch_model
from qat_patch.hosts.transformers.cache import FP4Layer, cache_argument
from support.families import every_causal_lm
from support.families.families import relative
from support.families.in_float64 import InFloat64
from support.families.transformers_families import CHUNKED
from support.models.tiny_qwen3 import logits, pad, token_ids
from tests.patch.transformers.test_packed_samples import logits as packed_logits
from tests.patch.transformers.test_packed_samples import pack
from tests.patch.transformers.test_vision_language import build as vision_language
from tests.patch.transformers.test_windows import in_parts


class Kind(NamedTuple):
    """A model, and what differs from one family to the next."""

    family: str
    changes: dict | None = None
    """What is published, in fields of its config; None: all tiny."""
    length: int = 40
    skipped: Mapping[str, str] = MappingProxyType({})
    packed: str | None = None
    """Why packed samples are refused."""
    cache: str | None = None
    """Why there is no FP4 cache."""


def heads(query, key, head_dim, **others):
    return {"num_attention_heads": query, "num_key_value_heads": key, "head_dim": head_dim, **others}


GPT_OSS = {"packed": "position_ids restart inside a row"}  # the stock model does not separate them
LLAMA4 = {"packed": CHUNKED.get("packed samples")}
RECURRENT = {"packed": "the Qwen3_5GatedDeltaNet of this model may carry its state from one sample to the next"}
KINDS = [
    Kind("gpt_oss", **GPT_OSS),
    Kind("gpt_oss", heads(64, 8, 64, sliding_window=128), length=135, **GPT_OSS),
    Kind("gemma2"),
    Kind("gemma2", heads(8, 4, 256, sliding_window=4096)),  # 2B
    Kind("gemma3_text"),
    Kind("gemma3_text", heads(4, 1, 256, sliding_window=512), length=520),  # 1B
    Kind("gemma4_text"),
    Kind(
        "gemma4_text",  # E2B
        heads(8, 1, 256, global_head_dim=512, sliding_window=512, num_kv_shared_layers=0)
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        length=520,
        skipped={"model.layers.2.self_attn": "head_dim 512: at most 256 is supported"},
    ),
    Kind("mistral"),
    Kind("mistral", heads(32, 8, 128, sliding_window=4096, num_hidden_layers=1)),  # 7B
    Kind("llama4_text", **LLAMA4),
    Kind(
        "llama4_text",  # Scout
        heads(40, 8, 128, num_hidden_layers=2, layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0]),
        **LLAMA4,
    ),
    Kind("qwen3_5_text", **RECURRENT),
    Kind("qwen3_5_text", heads(16, 4, 256), **RECURRENT),  # 9B
    Kind("qwen3_vl"),
    Kind("qwen3_vl", {"text_config": heads(32, 8, 128, num_hidden_layers=1)}),  # 8B
    Kind("deepseek_v3", cache="it uses what a cache returned: key_states, value_states = self.expand_kv"),
    Kind(
        "deepseek_v3",
        heads(128, 128, 64, qk_nope_head_dim=128, qk_rope_head_dim=64, qk_head_dim=192, v_head_dim=128, num_hidden_layers=1),
        cache="its keys have 192 elements and its values 128: an FP4 cache holds equal ones",
    ),
]


@pytest.fixture(autouse=True)
def in_float64():
    with InFloat64():
        yield


@functools.cache
def stock(number):
    kind = KINDS[number]
    return (vision_language if kind.family == "qwen3_vl" else every_causal_lm.build)(kind.family, kind.changes)


def patched(number):
    model = copy.deepcopy(stock(number))
    return model, patch_model(model)


each = pytest.mark.parametrize(
    "number", range(len(KINDS)), ids=[f"{x.family}-{'tiny' if x.changes is None else 'published'}" for x in KINDS]
)


def results(run, model, mask, gradients):
    """The logits of real tokens, and the gradients of all parameters."""
    with torch.set_grad_enabled(gradients):
        out = run(model)[mask.bool()]
    if gradients:
        out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@each
@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
def test_outputs_and_gradients_are_the_oracles(number, padded):
    """Of a sequence alone, and of two in a batch, one with padding before it and one with padding behind it. There gradients are
    those of tiny models."""
    kind = KINDS[number]
    gradients = not padded or kind.changes is None
    model, handle = patched(number)
    assert {name: why for name, why in handle.skipped.items() if ".visual." not in name} == kind.skipped
    ids, mask = token_ids(batch=1, length=kind.length) % 97 + 3, None
    if padded:
        both = [pad(ids[:, -25:], 5, side) for side in ("left", "right")]
        ids, mask = (torch.cat(x) for x in zip(*both, strict=True))
    given = {"attention_mask": mask, "use_cache": False}
    with handle.disabled():
        assert torch.equal(logits(model, ids, **given), logits(stock(number), ids, **given))
    mask = torch.ones_like(ids) if mask is None else mask
    found = results(lambda model: model(ids, **given).logits, model, mask, gradients)
    other = copy.deepcopy(stock(number))
    expected = results(lambda model: every_causal_lm.with_oracle(model, list(handle.patched), ids, mask), other, mask, gradients)
    assert len(found) == len(expected) > 10 * gradients
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True) if b.any()) < 1e-9
    assert relative(found[0], logits(stock(number), ids, **given)[mask.bool()]) > 1e-3
    assert all(a.any() == b.any() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
def test_with_calibrated_shifts_they_are_the_oracles(family):
    """Those with a soft cap or sinks have a Q shift only."""
    model = every_causal_lm.build(family)
    both = [pad(token_ids(batch=1, length=25) % 97 + 3, 5, side) for side in ("left", "right")]
    ids, mask = (torch.cat(x) for x in zip(*both, strict=True))
    given = {"attention_mask": mask, "use_cache": False}
    other, handle = copy.deepcopy(model), patch_model(model)
    plain = logits(model, ids, **given)[mask.bool()]
    calibrate(model, [{"input_ids": ids} | given])
    shifts = handle.shifts
    assert len(shifts["q_shift"]) == len(handle.patched) and bool(shifts["k_shift"]) == (family == "qwen3")
    found = results(lambda model: model(ids, **given).logits, model, mask, True)
    expected = results(
        lambda model: every_causal_lm.with_oracle(model, list(handle.patched), ids, mask, shifts), other, mask, True
    )
    assert len(found) == len(expected) > 10
    assert max(relative(a, b) for a, b in zip(found, expected, strict=True) if b.any()) < 1e-9
    assert relative(found[0], plain) > 1e-3


def fp4(kind, handle):
    """An FP4 cache, if there is one."""
    if kind.cache is None:
        cache = handle.cache()
        assert any(isinstance(layer, FP4Layer) for layer in cache.layers)
        return cache
    with pytest.raises(ValueError, match=re.escape(kind.cache)):
        handle.cache()
    return None


@each
def test_cached_and_uncached_are_alike(number):
    """The prompt, several tokens and single ones, with padding in front; then `generate`."""
    kind = KINDS[number]
    model, handle = patched(number)
    ids, mask = pad(token_ids(batch=1, length=kind.length - 5) % 97 + 3, 5, "left")
    whole, real = logits(model, ids, attention_mask=mask, use_cache=False), mask.bool()
    for cache in (None, fp4(kind, handle)):
        found = in_parts(model, ids, (kind.length - 17, kind.length - 2, kind.length - 1), mask, cache)
        assert relative(found[real], whole[real]) < 1e-9
    ids, mask = ids[:, :30], mask[:, :30]
    options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options, **{cache_argument(model): fp4(kind, handle)}), expected)


@each
def test_packed_samples_are_as_if_alone(number):
    kind = KINDS[number]
    model, _ = patched(number)
    samples = (token_ids(batch=1, length=kind.length)[0] % 97 + 3).split([13, 1, kind.length - 14])
    inputs = pack(*samples)
    if kind.packed is not None:
        with pytest.raises(ValueError, match=re.escape(kind.packed)):
            packed_logits(model, **inputs)
        return
    found = packed_logits(model, **inputs)
    alone = torch.cat([logits(model, sample[None], use_cache=False) for sample in samples], 1)
    assert relative(found, alone) < 1e-9


def test_the_stock_gpt_oss_does_not_separate_samples():
    """So it is refused, and the message says why."""
    model, samples = stock(0), (token_ids(batch=1, length=40)[0] % 97 + 3).split([13, 27])
    alone = torch.cat([logits(model, sample[None], use_cache=False) for sample in samples], 1)
    assert relative(packed_logits(model, **pack(*samples)), alone) > 1e-2
    with pytest.raises(ValueError, match="a model that separates samples by them; gpt-oss does not, without the patch either"):
        packed_logits(patched(0)[0], **pack(*samples))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_window_of_thousands_of_keys(family):
    """The published one, narrower than the text, in one layer."""
    kind = next(kind for kind in KINDS if kind.family == family and kind.changes is not None)
    model = every_causal_lm.build(family, {**kind.changes, "num_hidden_layers": 1})
    other = copy.deepcopy(model)
    handle, window = patch_model(model), kind.changes["sliding_window"]
    ids = token_ids(batch=1, length=window + 21) % 97 + 3
    found = logits(model, ids, use_cache=False)
    assert relative(found, every_causal_lm.reference(other, list(handle.patched), ids, torch.ones_like(ids))) < 1e-9
    assert relative(in_parts(model, ids, (window + 19, window + 20), cache=handle.cache())[:, -2:], found[:, -2:]) < 1e-9
