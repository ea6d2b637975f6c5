"""Every class that can be patched is exported and loaded as itself, or refused by name before anything is written."""

import pytest
import torch
import transformers
from transformers import AutoModel

from qat_patch import AttnQATConfig, export_checkpoint, get_handle, load_checkpoint, patch_model, verify_checkpoint
from support.models.tiny_qwen3 import tiny_qwen3

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}


def qwen3():
    return transformers.Qwen3Config(**SIZES, num_labels=3)


def moe():
    return transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, num_labels=3)


def bart(kind=transformers.BartConfig, **more):
    halves = {
        f"{half}_{name}": x
        for half in ("encoder", "decoder")
        for name, x in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
    }
    return kind(vocab_size=128, d_model=32, dropout=0.0, init_std=0.1, **halves, **more)


def whisper():
    lengths = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40}
    return bart(transformers.WhisperConfig, **lengths, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)


def llava():
    parts = {"text_config": transformers.LlamaConfig(**SIZES), "vision_config": transformers.CLIPVisionConfig(**VISION)}
    return transformers.LlavaConfig(**parts, image_token_index=100)


def qwen_vl():
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14}
    ids = {"image_token_id": 100, "video_token_id": 101, "vision_start_token_id": 102, "vision_end_token_id": 103}
    return transformers.Qwen2_5_VLConfig(text_config=SIZES | rope, vision_config=vision | {"fullatt_block_indexes": [0]}, **ids)


def gemma4():
    """Its layers with full attention have other head dims and key heads than the rest."""
    text = SIZES | {
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 32,
        "num_global_key_value_heads": 2,
    }
    text |= {"attention_k_eq_v": True, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128}
    vision = VISION | {"num_key_value_heads": 2, "head_dim": 16}
    return transformers.Gemma4Config(text_config=text, vision_config=vision)


# By class: its config.
FAST = {
    "Qwen3Model": qwen3,
    "Qwen3ForSequenceClassification": qwen3,
    "Qwen3ForQuestionAnswering": qwen3,
    "Qwen3MoeForCausalLM": moe,
    "BartForConditionalGeneration": bart,
    "BartForCausalLM": bart,
    "LlavaForConditionalGeneration": llava,
    "Gemma4ForConditionalGeneration": gemma4,
    "WhisperForConditionalGeneration": whisper,
}
SLOW = {
    "Qwen3ForTokenClassification": qwen3,
    "Qwen3MoeForSequenceClassification": moe,
    "BartModel": bart,
    "BartForSequenceClassification": bart,
    "BartForQuestionAnswering": bart,
    "LlavaModel": llava,
    "Qwen2_5_VLForConditionalGeneration": qwen_vl,
    "Qwen2_5_VLModel": qwen_vl,
    "GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=128, n_embd=32, n_head=2, n_layer=2, attn_pdrop=0),
    "GPT2DoubleHeadsModel": lambda: transformers.GPT2Config(vocab_size=128, n_embd=32, n_head=2, n_layer=2, attn_pdrop=0),
    "MarianMTModel": lambda: bart(transformers.MarianConfig, pad_token_id=0, eos_token_id=2, decoder_start_token_id=1),
}


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_loaded_as_itself(tmp_path, name):
    torch.manual_seed(0)
    model = getattr(transformers, name)((FAST | SLOW)[name]()).eval()
    patched = patch_model(model).specs
    export_checkpoint(model, tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    assert type(loaded) is type(model) and get_handle(loaded).specs == patched
    assert all(torch.equal(loaded.state_dict()[key], x) for key, x in model.state_dict().items())
    reads_tokens = name != "WhisperForConditionalGeneration"
    assert sum("bit-equal" in line for line in verify_checkpoint(tmp_path / "out")) == (2 if reads_tokens else 0)
    assert len(get_handle(AutoModel.from_pretrained(tmp_path / "out")).patched) == len(patched)
    model.save_pretrained(tmp_path / "saved")
    assert get_handle(type(model).from_pretrained(tmp_path / "saved")).specs == patched


class Renamed(transformers.Qwen3ForCausalLM):
    """A subclass that computes what its base does."""


class Louder(transformers.Qwen3ForCausalLM):
    """A subclass that computes something else."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Reward(transformers.Qwen3PreTrainedModel):
    """A model of the user's own."""

    def __init__(self, config):
        super().__init__(config)
        self.model = transformers.Qwen3Model(config)
        self.head = torch.nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(self, input_ids, **kwargs):
        return (self.head(self.model(input_ids, **kwargs)[0]),)


def test_subclasses_of_the_users(tmp_path):
    model = Renamed(qwen3()).eval()
    patch_model(model)
    export_checkpoint(model, tmp_path / "renamed")
    assert type(load_checkpoint(tmp_path / "renamed")) is transformers.Qwen3ForCausalLM
    for kind, message in (
        (Louder, "computes something else than the model does"),
        (Reward, "expected a class of transformers, got .*Reward"),
    ):
        model = kind(qwen3()).eval()
        patch_model(model)
        with pytest.raises(ValueError, match=f"export_checkpoint: .*{message}"):
            export_checkpoint(model, tmp_path / "refused")
        assert not (tmp_path / "refused").exists()


def test_a_reference_input_that_does_not_fit(tmp_path):
    model = tiny_qwen3(num_hidden_layers=1)
    patch_model(model, AttnQATConfig())
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM cannot run the reference input pixels, of example_inputs: You must"):
        export_checkpoint(model, tmp_path / "out", example_inputs={"pixels": torch.zeros(1)})
    assert not list(tmp_path.iterdir())
