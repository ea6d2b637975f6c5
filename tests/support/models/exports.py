"""Models before an export and after: what they compute, adapters for them, and exports of every kind."""

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel

from qat_patch import AttnQATConfig, QuantSpec, export_checkpoint, get_handle, load_checkpoint, patch_model
from qat_patch.checkpoint import export
from support.models.tiny_qwen3 import tiny_qwen3, token_ids
from support.models.tiny_wan import CHANNELS, TEXT_DIM, tiny_transformer


def velocity(transformer):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, CHANNELS, 2, 8, 8, generator=generator).to(transformer.dtype)
    text = torch.randn(1, 512, TEXT_DIM, generator=generator).to(transformer.dtype)
    with torch.no_grad():
        return transformer(latents, torch.tensor([500]), text, return_dict=False)[0]


def logits(model):
    with torch.no_grad():
        return model(token_ids()).logits


def add_lora(model):
    """Adapters with weights that do something."""
    targets = ["to_q", "to_v"] if isinstance(model, WanTransformer3DModel) else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    if isinstance(model, WanTransformer3DModel):
        model.add_adapter(config)
        return model
    return peft.get_peft_model(model, config)


# Small: a case is a copy of the folder and an attempt to load it.
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 32, "vocab_size": 64}


def write_exports(folder):
    """One file, shards with an index, a Wan transformer, adapters alone, and one for a server."""
    config = AttnQATConfig(exclude=["*.0.*"])
    model = tiny_qwen3(**TINY)
    model.save_pretrained(folder / "base")
    patch_model(model, config)
    export_checkpoint(model, folder / "single", training={"steps": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_SHARD_SIZE", "20KB")
        export_checkpoint(model, folder / "sharded")
    wan = tiny_transformer(layers=2)
    patch_model(wan, config)
    export_checkpoint(wan, folder / "wan")
    adapters = add_lora(tiny_qwen3(**TINY))
    patch_model(adapters, config)
    export_checkpoint(adapters, folder / "adapters", merge_adapters=False, base_model=str(folder / "base"))
    served = tiny_qwen3(**TINY)
    patch_model(served, AttnQATConfig(spec=QuantSpec(preset="kv_nvfp4")))
    export_checkpoint(served, folder / "server", server="vllm", auto_enable=True)


def outcome(folder, original):
    """`refused`, or `loaded` if what comes out is what was exported; anything else is a failure."""
    try:
        model = load_checkpoint(folder)
    except ValueError as error:
        assert len(str(error)) > 20 and str(error).startswith(
            ("load_checkpoint", "attention metadata", "AttnQATConfig", "QuantSpec", str(folder))
        )
        return "refused"
    expected = load_checkpoint(original)
    state = expected.state_dict()
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) and x.dtype == state[name].dtype for name, x in model.state_dict().items())
    assert {name: x.spec for name, x in get_handle(model).patched.items()} == {
        name: x.spec for name, x in get_handle(expected).patched.items()
    }
    if hasattr(model, "lm_head"):
        with torch.no_grad():
            ids = token_ids(1, 20) % TINY["vocab_size"]
            assert torch.equal(model(ids).logits, expected(ids).logits)
    return "loaded"
