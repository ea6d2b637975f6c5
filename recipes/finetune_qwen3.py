"""Fine-tune a causal language model of Transformers for 4-bit attention: Qwen3, or any other that qat_patch can patch.

accelerate launch recipes/finetune_qwen3.py --config recipes/configs/qwen3_14b.yaml learning_rate=1e-5
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from loop import train
from settings import read_settings
from task import FineTuning, FineTuningSettings
from text_data import ShuffledBatches, TextSettings, load_blocks

_TOKENS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(FineTuningSettings):
    """Fine-tune a causal language model for 4-bit attention."""

    data: TextSettings
    """Text to train on and to measure on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_eval(self.data.has_eval)


class NextToken:
    """Next-token prediction; `batch["input_ids"]` is int64 [batch, length], outputs are logits [batch, length, vocabulary]."""

    distance_name = "kl"

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**inputs, use_cache=False).logits

    def loss(self, outputs: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean cross-entropy."""
        return functional.cross_entropy(outputs[:, :-1].flatten(0, 1).float(), inputs["input_ids"][:, 1:].flatten())

    def distance(self, outputs: torch.Tensor, teacher_outputs: torch.Tensor) -> torch.Tensor:
        """Mean KL(teacher || student) over tokens, computed in float32."""
        outputs, teacher_outputs = outputs.flatten(0, 1), teacher_outputs.flatten(0, 1)
        parts = zip(outputs.split(_TOKENS_AT_ONCE), teacher_outputs.split(_TOKENS_AT_ONCE), strict=True)
        # Computed again in the backward pass: log-probabilities of a few tokens are all that is ever held.
        sums = [checkpoint(_kl_sum, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(sums).sum() / len(outputs)


def _kl_sum(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


class LanguageModeling(FineTuning):
    """A language model learns to predict the next token: the task of the loop."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        self.source = {"pretrained_model_name_or_path": settings.model.path, "revision": settings.model.revision or "main"}
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        # Files that have to be downloaded or cached are so once.
        with accelerator.main_process_first():
            self.train_data, self.eval_data = load_blocks(settings.data, self.tokenizer)
        super().__init__(settings)
        self.objective, self.eval_batch_size = NextToken(), settings.batch_size

    def load(self) -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(**self.source, dtype=torch.float32)
        if self.settings.model.gradient_checkpointing:
            model.activation_checkpointing_enable()
        return model

    def batches(self, start: int, stop: int) -> ShuffledBatches:
        return ShuffledBatches(len(self.train_data), self.settings.batch_size, self.settings.seed, start, stop)

    @staticmethod
    def tokens(batch: dict[str, torch.Tensor]) -> int:
        return batch["input_ids"].numel()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the command line says; returns the measured losses."""
    settings = read_settings(Settings, arguments)
    return train(settings, lambda accelerator: LanguageModeling(settings, accelerator))


if __name__ == "__main__":
    main()
