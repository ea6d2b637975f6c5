"""Tiny language models, built from configs."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

VOCAB = 128


def tiny_qwen3(dtype=torch.float32, seed=0, **overrides):
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "initializer_range": 0.1,
    }
    return Qwen3ForCausalLM(Qwen3Config(**sizes | overrides)).eval().to(dtype)


def tiny_llama(dtype=torch.float32, seed=0, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=96,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=VOCAB,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def token_ids(batch=2, length=50, seed=1):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad(ids, amount, side):
    """The ids with `amount` padding tokens, and the attention mask."""
    padding = torch.zeros(ids.shape[0], amount, dtype=torch.long)
    parts, masks = [ids, padding], [torch.ones_like(ids), padding]
    if side == "left":
        parts, masks = parts[::-1], masks[::-1]
    return torch.cat(parts, 1), torch.cat(masks, 1)


def logits(model, *inputs, **options):
    with torch.no_grad():
        return model(*inputs, **options).logits


def checkpoint_activations(model):
    """By the name that this release of transformers has for it."""
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
