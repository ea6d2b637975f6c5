"""Every causal language model of the installed Transformers, tiny, and what the patch makes of it: a table in docs/MODELS.md.

PYTHONPATH=.:kernels:tests python -m support.families.every_causal_lm examines them (3 minutes) and writes what it found to a JSON
file; `models_table.py` makes the table of it.
"""

import ast
import copy
import dataclasses
import inspect
import json
import re
import warnings
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from qat_patch import AttnQATConfig, patch_model
from support.families.families import lively, relative
from support.families.oracle_function import oracle_attention
from support.models.tiny_qwen3 import logits, pad, token_ids

FILE = Path(__file__).with_suffix(".json")
# What fields of configs are called, and what makes a model tiny without taking anything out of it.
SIZES = {
    "vocab_size": 128,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "embedding_size", "emb_dim", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dim_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "dim_head", "rotary_dim", "kv_channels", "attention_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_target_positions", "n_ctx"), 256),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("expert_ffn_hidden_size", "ffn_hidden_size", "dense_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "o_lora_rank"), 16),
    **dict.fromkeys(("n_group", "num_expert_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("v_head_dim", "index_head_dim", "qk_head_dim"), 32),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "index_n_heads", "num_codebooks"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "mamba_d_state": 16, "ssm_state_size": 16, "mamba_d_ssm": 128, "mamba_expand": 2, "index_topk": 8, "index_topk_blocks": 2,
    "index_block_size": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128, "first_k_dense_replace": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "is_decoder": True,
    "max_image_size": 32, "image_size": 32, "patch_size": 16, "audio_vocab_size": 128, "num_kv_shared_layers": 0,
}  # fmt: skip
NARROW = {"sliding_window": 12, "attention_chunk_size": 16}
"""Less than the tokens of a test, and no multiple of 16 where that is nothing special."""
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}
"""The last layer of a kind before the last two keeps what it returned for those."""
_GEMMA4 = _SHARED | {"head_dim": 16, "global_head_dim": 16}
OF_ONE_TYPE = {
    "blt": {
        "patch_in_forward": False,
        "encoder_hash_byte_group_vocab": 512,
        "patcher_config": {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 48},
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "gemma4_unified": {"text_config": _GEMMA4},
    "gemma3n_text": _SHARED,
    "llama4_text": {"num_hidden_layers": 4},
    "lfm2": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "qwen3_5": {"vision_config": {"depth": 2}},
    "qwen3_vl": {"vision_config": {"depth": 2, "deepstack_visual_indexes": [0], "out_hidden_size": 64}},
    "qwen4_exp_text": {
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
    },
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 8, "attn_layer_period": 3, "attn_layer_offset": 1},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the classes need that names of fields do not tell."""
OUTSIDE = "its attention does not go through AttentionInterface"
LENGTH, PADDING, CUT = 40, 5, 23


@dataclasses.dataclass(frozen=True)
class Finding:
    """What was found about a class. A row of docs/MODELS.md."""

    name: str
    outcome: str
    """exact; partly, if some modules are refused; refused; or not built"""
    patched: int = 0
    others: int = 0
    """Attention modules that keep their original attention."""
    why: str = ""
    """What is refused, and why; or why it was not built."""
    cache: str = ""
    """FP4, or why not."""


def model_types() -> list[str]:
    """One for every class, in alphabetical order."""
    first: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        first.setdefault(name, model_type)
        if model_type.endswith("_text"):
            first[name] = model_type  # the language model by itself
    return sorted(first.values())


def tiny(config_class, changes: dict):
    """A config of few and small layers, whatever its fields are called."""
    probe = config_class()
    fields = {**vars(probe)}
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    sizes |= {name: 0.0 for name, value in fields.items() if "drop" in name and isinstance(value, float)}
    if "kv_lora_rank" in fields:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    by_layer = [
        name
        for name, value in fields.items()
        if isinstance(value, list | tuple) and value and len(value) == getattr(probe, "num_hidden_layers", -1)
    ]
    kinds = {name: list(dict.fromkeys(fields[name])) for name in by_layer}
    layers = changes.get("num_hidden_layers", max([2, *map(len, kinds.values())]))
    sizes |= {name: (kinds[name] * layers)[:layers] for name in by_layer}
    sizes |= {name: layers for name in ("num_hidden_layers", "n_layer", "num_layers") if name in sizes}
    for name in getattr(config_class, "sub_configs", {}):
        if isinstance(fields.get(name), transformers.PreTrainedConfig):
            sizes[name] = tiny(type(fields[name]), changes.get(name, {}))
    changes = {name: value for name, value in changes.items() if name not in sizes or not isinstance(value, dict)}
    sizes |= changes
    sizes |= {name: size for name, size in NARROW.items() if isinstance(fields.get(name), int) and name not in changes}
    return config_class(**sizes)


def build(model_type: str, changes: dict | None = None) -> torch.nn.Module:
    """A tiny model with weights that make attention matter, in float64. `changes` are of its config."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    torch.manual_seed(0)
    model = model_class(tiny(model_class.config_class, OF_ONE_TYPE.get(model_type, {}) | (changes or {})))
    model.set_experts_implementation("eager")
    model = lively(model).double().eval()
    for module in model.modules():
        if type(module).__name__.startswith("Inkling2") and "Router" in type(module).__name__:
            module.float()  # computes in float32, whatever the model does
    return model


def reference(stock, layers, ids, mask, **inputs):
    """The logits of the stock model with the float64 oracle for the attention of these modules. Nothing of the patch runs."""
    with torch.no_grad():
        return with_oracle(stock, layers, ids, mask, **inputs)


def with_oracle(stock, layers, ids, mask, shifts=None, **inputs):
    """The same, with gradients. `shifts`: those of each kind by module name, as `patch_model` takes them."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    ours = {stock.get_submodule(name): name for name in layers}
    reached = set()

    def by_mask(module, query, key, value, mask, options):
        """What the stock mask shows, one sequence after the other; a chunk as if it were alone."""
        out = query.new_zeros(*query.shape[:-1], value.shape[-1])
        for row, seen in enumerate(mask[:, 0]):
            first = torch.where(seen.any(-1), seen.int().argmax(-1), 0)
            last = seen.shape[-1] - 1 - seen.flip(-1).int().argmax(-1)
            last = torch.where(seen.any(-1), last, -1)
            kinds = dict(enumerate(getattr(module.config, "layer_types", None) or []))
            in_chunks = kinds.get(module.layer_idx) == "chunked_attention"
            starts = first[last >= 0].unique().tolist() if in_chunks else [0]
            for start in starts:
                rows = ((first == start) & (last >= 0)) if len(starts) > 1 else torch.ones_like(last, dtype=torch.bool)
                keys = slice(start, int(last[rows].max()) + 1)
                out[row : row + 1, :, rows] = oracle_attention(
                    query[row : row + 1, :, rows],
                    key[row : row + 1, :, keys],
                    value[row : row + 1, :, keys],
                    **options,
                    key_mask=seen[rows].any(0)[None, keys],
                    bounds=(first[rows][None] - start, last[rows][None] - start),
                ).to(out)
        return out

    def forward(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module not in ours:
            return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        reached.add(ours[module])
        options = {"scale": scaling, "softcap": kwargs.get("softcap"), "sinks": kwargs.get("s_aux")}
        options |= {which: found.get(ours[module]) for which, found in (shifts or {}).items()}
        if attention_mask is None:
            out = oracle_attention(query, key, value, causal=True, **options)
        else:
            out = by_mask(module, query, key, value, attention_mask, options)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("oracle", forward)
    AttentionMaskInterface.register("oracle", sdpa_mask)
    stock.set_attn_implementation("oracle")
    # Rotary embeddings turn Q and K before they are quantized: padding in front counts as no position then (docs/NUMERICS.md).
    turning = [each for each in stock.modules() if isinstance(each, PreTrainedModel) and hasattr(each, "rotary_emb")]
    rotary = any("position_ids" in inspect.signature(each.forward).parameters for each in turning)
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if rotary else {}
    found = stock(ids, attention_mask=mask, use_cache=False, **positions | inputs).logits
    assert reached == set(layers), f"no call of {set(layers) - reached}"
    return found


def examine(model_type: str) -> Finding:
    """Builds, patches and compares one class.

    Raises:
        AssertionError: numbers differ.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        stock = build(model_type)
    except Exception as error:
        return Finding(name, "not built", why=f"{type(error).__name__}: {short(error)}")
    model, refused = copy.deepcopy(stock), ""
    try:
        handle = patch_model(model)
    except ValueError as error:
        refused = reason(error)
        exclude = re.search(r"AttnQATConfig\(exclude=(\[.*\])\)", str(error))
        try:
            handle = patch_model(model, AttnQATConfig(exclude=ast.literal_eval(exclude[1])) if exclude else None)
        except ValueError:
            return Finding(name, "refused", why=refused)
    finding = Finding(name, "partly" if refused else "exact", len(handle.patched), len(handle.skipped), refused)
    ids = token_ids(length=LENGTH) % 97 + 3
    try:
        plain = logits(stock, ids, use_cache=False)
        for side in ("left", "right"):  # some stock models make NaN of rows of padding, in float64
            padded, mask = pad(ids, PADDING, side)
            masked = logits(stock, padded, attention_mask=mask, use_cache=False)
            if not masked.isnan().any():
                break
    except Exception as error:
        return Finding(name, "not built", why=f"{type(error).__name__}: {short(error)}")
    inputs = ({"input_ids": ids}, {"input_ids": padded, "attention_mask": mask})
    real = mask.bool()
    with handle.disabled():
        for each, expected in zip(inputs, (plain, masked), strict=True):
            assert torch.equal(logits(model, **each, use_cache=False), expected), "disabled() is not the stock model"
    whole, found = (logits(model, **each, use_cache=False) for each in inputs)
    assert relative(found[real], masked[real]) > 1e-4, "4-bit attention changes nothing"
    expected = reference(copy.deepcopy(stock), list(handle.patched), padded, mask)
    assert relative(found[real], expected[real]) < 1e-6, "4-bit attention is not the oracle's"
    try:
        goes_on = relative(in_parts(stock, None, ids), plain) < 1e-6
    except RuntimeError:
        goes_on = False
    if not goes_on:
        return dataclasses.replace(finding, cache="it cannot take several tokens on a cache, and cannot without the patch either")
    assert relative(in_parts(model, None, ids), whole) < 1e-6, "on a cache"
    try:
        cache = handle.cache()
    except ValueError as error:
        return dataclasses.replace(finding, cache=reason(error))
    assert relative(in_parts(model, cache, ids), whole) < 1e-6, "on an FP4 cache"
    return dataclasses.replace(finding, cache="FP4")


def in_parts(model, cache, ids):
    """The logits of all tokens, of which some come later, and the last one alone: on a cache."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    found = []
    with torch.no_grad():
        for part in (ids[:, :CUT], ids[:, CUT:-1], ids[:, -1:]):
            out = model(part, use_cache=True, **({} if cache is None else {name: cache}))
            cache = out[name]
            found.append(out.logits)
    return torch.cat(found, 1)


def short(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:160] if str(error).strip() else ""


def reason(error: ValueError) -> str:
    """Why, in a message of ours, without the modules and what to do about it."""
    text = re.sub(
        r"^.*?that 4-bit attention cannot do: |^patch_model: |^cache: .*?\(|; or leave them out.*$|; no other is left$"
        r"|\); generate with.*$",
        "",
        str(error),
    )
    text = re.sub(r"[\w.]+\.\d+\.[\w.]+( and \d+ more)?: ", "", text)
    text = re.sub(r"found no attention in \w+ that goes through .*", OUTSIDE, text)
    text = re.sub(r"nothing to patch in \w+ \((.*)\)", r"\1", text)
    return "; ".join(part for part in dict.fromkeys(text.split("; ")) if part != "...")


def load() -> dict[str, dict]:
    """What the last sweep found, by the name of the class."""
    return {row["name"]: row for row in json.loads(FILE.read_text(encoding="utf-8"))["classes"]}


def version() -> str:
    """Of transformers, when the last sweep ran."""
    return json.loads(FILE.read_text(encoding="utf-8"))["transformers"]


def main() -> None:
    """Examine all classes, and write what was found."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for model_type in model_types():
        finding = examine(model_type)
        print(f"{model_type}: {finding.outcome} {finding.patched}+{finding.others}, {finding.why}, {finding.cache}", flush=True)
        rows.append(dataclasses.asdict(finding))
    rows.sort(key=lambda row: row["name"].lower())
    FILE.write_text(json.dumps({"transformers": transformers.__version__, "classes": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
