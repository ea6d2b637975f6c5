"""Fine-tune a causal language model of Transformers for 4-bit attention: Qwen3, or any other that qat_patch can patch.

accelerate launch recipes/finetune_qwen3.py --config recipes/configs/qwen3_14b.yaml learning_rate=1e-5
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loop import train
from qat_patch import PatchHandle, export_checkpoint, get_handle, patch_model, unpatch_model
from settings import read_settings
from text_data import TextSettings, load_blocks
from training_settings import TrainingSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model to start from."""

    path: str
    """Name on the Hub, or a folder that holds model and tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    gradient_checkpointing: bool = False
    """Keep only the inputs of the layers and compute the rest again in the backward pass: less memory, a third slower."""
    export_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the exported weights; held-out losses are measured before this rounding."""

    def __post_init__(self) -> None:
        if self.revision is not None and Path(self.path).exists():
            raise ValueError(f"model.revision: only models on the Hub have one, and {self.path} is local; leave it out")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """Fine-tune a causal language model for 4-bit attention."""

    model: ModelSettings
    """The model to start from."""
    data: TextSettings
    """Text to train on and to measure on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_eval(self.data.has_eval)


class LanguageModeling:
    """Next-token prediction with full fine-tuning: the task of the loop."""

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        self.source = {"pretrained_model_name_or_path": settings.model.path, "revision": settings.model.revision or "main"}
        self.settings = settings
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        # Files that have to be downloaded or cached are so once.
        with accelerator.main_process_first():
            self.train_data, self.eval_data = load_blocks(settings.data, self.tokenizer)
        # Master weights: autocast makes the copies that mixed precision computes with.
        self.model = AutoModelForCausalLM.from_pretrained(**self.source, dtype=torch.float32)
        self.model_class = type(self.model)  # sharding will change it
        self.handle = self._patch(self.model)
        if settings.model.gradient_checkpointing:
            self.model.activation_checkpointing_enable()

    @staticmethod
    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy of the next token; `batch["input_ids"]` is int64 [batch, sequence_length]."""
        return model(**batch, labels=batch["input_ids"], use_cache=False).loss

    @staticmethod
    def tokens(batch: dict[str, torch.Tensor]) -> int:
        return batch["input_ids"].numel()

    def export(
        self, folder: Path, training: dict[str, Any], metrics: dict[str, float], weights: dict[str, torch.Tensor] | None
    ) -> None:
        model, path = self.model, self.settings.model.path
        if weights is not None:
            config = AutoConfig.from_pretrained(**self.source)
            model = self.model_class.from_pretrained(None, config=config, state_dict=weights, dtype=torch.float32)
            model.generation_config = self.model.generation_config
            self._patch(model)
        export_checkpoint(
            model,
            folder,
            tokenizer=self.tokenizer,
            training=training,
            metrics=metrics,
            base_model=None if Path(path).exists() else path,
            dtype=getattr(torch, self.settings.model.export_dtype),
        )

    def _patch(self, model: torch.nn.Module) -> PatchHandle:
        if get_handle(model) is not None:
            # An export of ours is patched as it was exported; here the settings say how.
            unpatch_model(model)
        return patch_model(model, self.settings.qat)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the command line says; returns the measured losses."""
    settings = read_settings(Settings, arguments)
    return train(settings, lambda accelerator: LanguageModeling(settings, accelerator))


if __name__ == "__main__":
    main()
