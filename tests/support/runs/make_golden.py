"""Writes the golden exports of this format version: `python -m tests.support.runs.make_golden`, once for each FORMAT_VERSION.

They are in the repository so that later versions of the package read what this one wrote: tests/checkpoint/test_golden.py. Never
write them again for a format version that was released. Tiny models with random weights, a few kilobytes each.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import torch
from diffusers import WanTransformer3DModel
from transformers import Qwen3Config, Qwen3ForCausalLM

from qat_patch import AttnQATConfig, QuantSpec, export_checkpoint, patch_model
from qat_patch.checkpoint import export
from qat_patch.metadata import FORMAT_VERSION

GOLDEN = Path(__file__).parents[2] / "golden"
TRAINING = {"steps": 3, "learning_rate": 1e-5, "distillation": None}


def language_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    config = Qwen3Config(**sizes, intermediate_size=16, vocab_size=32, initializer_range=0.2, max_position_embeddings=64)
    return Qwen3ForCausalLM(config).eval()


def video_model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 1,
        "attention_head_dim": 32,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 8,
    }
    return WanTransformer3DModel(**sizes, ffn_dim=16, num_layers=2, rope_max_seq_len=16).eval()


def main(folder: Path) -> None:
    """Write them all; `folder` must not exist."""
    model = language_model()
    patch_model(model, AttnQATConfig(exclude=["*.0.*"]))
    export_checkpoint(model, folder / "language-model", training=TRAINING, metrics={"eval_loss_fp4": 1.25})
    export_checkpoint(model, folder / "language-model-bfloat16", dtype=torch.bfloat16)

    shard_size, export._SHARD_SIZE = export._SHARD_SIZE, "10KB"
    model = language_model()
    patch_model(model, AttnQATConfig(spec=QuantSpec(rotate=True, four_over_six=True)))
    export_checkpoint(model, folder / "language-model-sharded")
    export._SHARD_SIZE = shard_size

    model = language_model()
    overrides = {"*.1.*": QuantSpec(rotate=True), "*": QuantSpec(preset="nvfp4_qk")}
    generator = torch.Generator().manual_seed(1)
    shift = {"model.layers.0.self_attn": torch.randn(1, 16, generator=generator)}
    patch_model(model, AttnQATConfig(overrides=overrides), k_shift=shift)
    export_checkpoint(model, folder / "language-model-shifted")

    model = video_model()
    patch_model(model, AttnQATConfig(spec=QuantSpec(preset="nvfp4_qk"), include=["*.attn1"]))
    export_checkpoint(model, folder / "video-model", training=TRAINING, base_model="someone/a-video-model")

    language_model().save_pretrained(folder / "base")
    model = peft.get_peft_model(
        language_model(), peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    patch_model(model)
    # Relative to the working directory: tests change to this folder.
    export_checkpoint(model, folder / "adapters", merge_adapters=False, base_model="base")
    for card in folder.rglob("README.md"):
        card.unlink()  # for people


if __name__ == "__main__":
    version = GOLDEN / f"format-{FORMAT_VERSION}"
    shutil.rmtree(version, ignore_errors=True)
    main(version)
