"""What PEFT can train besides layers' weights: exported right, or refused before anything is written."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qat_patch import export_checkpoint, load_checkpoint, patch_model
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")


def with_adapters(tied=False, **options):
    config = LoraConfig(**{"target_modules": ["q_proj"]} | options, init_lora_weights=False)
    model = get_peft_model(tiny_qwen3(tie_word_embeddings=tied), config).eval()
    patch_model(model)
    return model


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}], ids=lambda x: next(iter(x))
)
def test_modules_that_were_trained_whole_are_exported_after_merging(tmp_path, options):
    model = with_adapters(**options)
    with pytest.raises(ValueError, match=r"a copy of a module .* export what merge_and_unload\(\) returns"):
        export_checkpoint(model, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []
    merged = model.merge_and_unload()
    export_checkpoint(merged, tmp_path / "export")
    assert torch.equal(logits(load_checkpoint(tmp_path / "export")), logits(merged))


def test_embeddings(tmp_path):
    """Adapters on an embedding are merged; on one that is the output embedding too they cannot be."""
    embedding = {"target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(ValueError, match="embed_tokens has adapters, and the model shares its weights"):
        export_checkpoint(with_adapters(tied=True, **embedding), tmp_path / "tied")
    assert list(tmp_path.iterdir()) == []
    model = with_adapters(**embedding)
    export_checkpoint(model, tmp_path / "export")
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "export")), logits(model), rtol=1e-4, atol=1e-4)


def test_a_compiled_transformer_of_a_pipeline(tmp_path):
    pipe = tiny_pipeline(layers=1)
    patch_model(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    export_checkpoint(pipe, tmp_path / "export")
    loaded, original = load_checkpoint(tmp_path / "export").transformer.state_dict(), pipe.transformer._orig_mod.state_dict()
    assert loaded.keys() == original.keys() and all(torch.equal(loaded[name], x) for name, x in original.items())
