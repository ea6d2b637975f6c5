"""The published configs of the measured models, and small ones. Only sizes, so that no Hub is needed."""

from __future__ import annotations


def qwen3(hidden: int, layers: int, heads: int, feed_forward: int, vocabulary: int = 151_936, *, tied: bool) -> dict[str, int]:
    """A config of Qwen3."""
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    config |= {"head_dim": 128, "intermediate_size": feed_forward, "vocab_size": vocabulary, "tie_word_embeddings": tied}
    return config


def llama(hidden: int, layers: int, heads: int, key_heads: int, feed_forward: int, vocabulary: int) -> dict[str, int]:
    """A config of Llama with head dim 64 and tied embeddings."""
    config = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    config |= {"head_dim": 64, "intermediate_size": feed_forward, "vocab_size": vocabulary, "tie_word_embeddings": True}
    return config


def wan(heads: int, layers: int, feed_forward: int) -> dict[str, int]:
    """A config of Wan 2.1 T2V, or of each transformer of Wan 2.2 T2V."""
    return {
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "num_layers": layers,
        "ffn_dim": feed_forward,
        "text_dim": 4096,
    }


CONFIGS = {
    "Wan 2.1 1.3B": wan(12, 30, 8960),
    "Wan 2.1 14B": wan(40, 40, 13_824),
    "Wan 2.2 A14B": wan(40, 40, 13_824),
    "Qwen3 0.6B": qwen3(1024, 28, 16, 3072, tied=True),
    "Qwen3 1.7B": qwen3(2048, 28, 16, 6144, tied=True),
    "Qwen3 4B": qwen3(2560, 36, 32, 9728, tied=True),
    "Qwen3 8B": qwen3(4096, 36, 32, 12_288, tied=False),
    "Qwen3 14B": qwen3(5120, 40, 40, 17_408, tied=False),
}
SMOLLM2_135M = llama(576, 30, 9, 3, 1536, 49_152)
TINY_CONFIGS = {
    "Wan 2.1 tiny": {**wan(2, 2, 64), "attention_head_dim": 16, "text_dim": 32},
    "Wan 2.2 tiny": {**wan(2, 2, 64), "attention_head_dim": 16, "text_dim": 32},
    "Qwen3 tiny": qwen3(64, 2, 8, 64, 128, tied=True) | {"head_dim": 16},
}
SMOLLM2_TINY = llama(64, 2, 4, 2, 64, 128) | {"head_dim": 16}
