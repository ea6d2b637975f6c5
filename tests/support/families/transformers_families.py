"""Tiny language models of Transformers, a family each."""

import transformers
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration, masking_utils

from support.families.families import Family
from support.models.tiny_qwen3 import VOCAB, token_ids

SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
SLIDING = {"static cache": "nor a static one whose window slides"}
# Older releases count chunks across samples.
COUNTS_IN_SAMPLES = hasattr(masking_utils, "remap_positions_for_packed_sequence")
CHUNKED = {} if COUNTS_IN_SAMPLES else {"packed samples": "unsupported mask"}
FULLGRAPH = "`torch.compile(fullgraph=True)`, training"
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def causal_lm(config, **overrides):
    # Another way through the experts of a mixture knows no float64.
    mixture = any(name in config for name in ("Moe", "Oss", "Deepseek"))
    options = {"experts_implementation": "batched_mm"} if mixture else {}
    return lambda: AutoModelForCausalLM.from_config(getattr(transformers, config)(**SIZES | overrides), **options)


def inputs():
    return {"input_ids": token_ids(length=40)}


FAMILIES = [
    Family("Qwen3", causal_lm("Qwen3Config", head_dim=32), inputs, calls=2),
    Family(
        "Qwen3-MoE",
        causal_lm("Qwen3MoeConfig", head_dim=32, num_experts=4, num_experts_per_tok=4, moe_intermediate_size=32),
        inputs,
        calls=2,
    ),
    Family("Qwen2", causal_lm("Qwen2Config"), inputs, calls=2),
    Family("Llama", causal_lm("LlamaConfig"), inputs, calls=2),
    Family("Mistral, no window", causal_lm("MistralConfig", sliding_window=None), inputs, calls=2),
    Family("Mistral", causal_lm("MistralConfig", sliding_window=12), inputs, calls=2, refused_modes=SLIDING),
    Family(
        "Gemma 2",
        causal_lm("Gemma2Config", head_dim=16, sliding_window=12),
        inputs,
        calls=2,
        no_k_shift=("*",),
        refused_modes=SLIDING,
    ),
    Family(
        "Gemma 3",
        causal_lm("Gemma3TextConfig", num_hidden_layers=4, head_dim=16, sliding_window=12, layer_types=GEMMA3_LAYERS),
        inputs,
        calls=4,
        refused_modes=SLIDING,
    ),
    Family(
        "Gemma 4",  # whose last two layers read keys and values of those before them
        causal_lm(
            "Gemma4TextConfig",
            num_hidden_layers=4,
            layer_types=GEMMA3_LAYERS,
            num_kv_shared_layers=2,
            head_dim=16,
            global_head_dim=16,
            sliding_window=12,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB,
        ),
        inputs,
        calls=4,
        refused_modes=SLIDING,
    ),
    Family(
        "gpt-oss",
        causal_lm("GptOssConfig", head_dim=16, num_local_experts=2, num_experts_per_tok=2, sliding_window=12),
        inputs,
        calls=2,
        no_k_shift=("*",),
        # The stock model does not separate them.
        refused_modes=SLIDING | {"packed samples": "position_ids restart inside a row (packed samples)"},
    ),
    Family(
        "Llama 4, text",
        causal_lm(
            "Llama4TextConfig",
            num_hidden_layers=4,
            head_dim=16,
            attention_chunk_size=16,
            intermediate_size_mlp=48,
            num_local_experts=2,
        ),
        inputs,
        calls=4,
        refused_modes={FULLGRAPH: "torch.compile cannot see chunks of 16 tokens"} | CHUNKED,
    ),
    Family(
        "Qwen3.5",
        causal_lm(
            "Qwen3_5TextConfig",
            head_dim=32,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        inputs,
        calls=1,
        refused_modes={"packed samples": "may carry its state from one sample to the next"},
        not_applicable=(FULLGRAPH,),
    ),
    Family(
        "DeepSeek V3",  # with its own head dims, 128 + 64 and 128
        causal_lm(
            "DeepseekV3Config",
            num_attention_heads=2,
            head_dim=64,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            q_lora_rank=16,
            kv_lora_rank=16,
            first_k_dense_replace=1,
            moe_intermediate_size=32,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
        ),
        inputs,
        calls=2,
    ),
    Family("SmolLM3", causal_lm("SmolLM3Config"), inputs, calls=2),
    Family("Phi-3", causal_lm("Phi3Config", sliding_window=None), inputs, calls=2),
    Family(
        "GPT-2",
        causal_lm("GPT2Config", n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
        inputs,
        calls=2,
    ),
]
REFUSED = [
    Family("Bloom", causal_lm("BloomConfig", n_head=4), refused="found no attention in BloomForCausalLM"),
    Family(
        "T5",
        lambda: T5ForConditionalGeneration(T5Config(d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, vocab_size=VOCAB)),
        refused="a position bias (position_bias)",
    ),
    Family("MPT", causal_lm("MptConfig", d_model=64, n_heads=4, n_layers=1), refused="found no attention in MptForCausalLM"),
]
