"""The task of a causal language model of Transformers: predict the next token of texts, or the answers of conversations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from qat_patch import get_handle, patch_model, unpatch_model
from qat_patch.checkpoint.load import check_tokenizer
from qat_recipes.command_line import to_dict
from qat_recipes.data.chat import IGNORED, load_chat
from qat_recipes.data.generated import generated_text
from qat_recipes.data.streaming import StreamedBlocks, WindowBatches
from qat_recipes.data.text import (
    ShuffledBatches,
    TextSettings,
    check_vocabulary,
    fingerprint_of_blocks,
    fingerprint_of_tokenizer,
    load_blocks,
    load_source,
    pack_sequences,
)
from qat_recipes.training.fingerprint import digest_of_weights

from .fine_tuning import FineTuning, FineTuningSettings, move_out_of_files

TOKENS_AT_ONCE = 1024
"""The number of tokens whose log-probabilities are in memory while a distance is computed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(FineTuningSettings):
    """Fine-tune a causal language model for 4-bit attention."""

    data: TextSettings
    """Text to train on and to measure on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_eval(self.data.has_eval)


class NextToken:
    """Next-token prediction in packed documents, none of which attends to another.

    A batch holds `input_ids` and `position_ids`, both int64 [batch, length]; a document starts where a position is 0. With
    `labels`, also int64 [batch, length], these are the targets. Outputs are logits [batch, length, vocabulary].
    """

    distance_name = "kl"

    def inputs(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The batch, and the starts of its documents in the flattened rows, as for FlashAttention."""
        starts = (batch["position_ids"] == 0).flatten().nonzero().squeeze(1)
        bounds = functional.pad(starts, (0, 1), value=batch["position_ids"].numel()).int()
        longest = int(bounds.diff().max())
        return batch | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

    def outputs(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        # With a cache, documents would attend to earlier ones. With labels, transformers would also compute a loss.
        return model(**{name: x for name, x in inputs.items() if name != "labels"}, use_cache=False).logits

    def loss(self, outputs: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Mean cross-entropy of all tokens except the first of each document.

        For conversations only tokens with labels count. All batches have the same weight, also those with fewer such tokens.
        """
        targets = inputs.get("labels", inputs["input_ids"]).masked_fill(inputs["position_ids"] == 0, IGNORED)
        return functional.cross_entropy(outputs[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten(), ignore_index=IGNORED)

    def distance(self, outputs: torch.Tensor, teacher_outputs: torch.Tensor) -> torch.Tensor:
        """Mean KL(teacher || student) over tokens, computed in float32."""
        outputs, teacher_outputs = outputs.flatten(0, 1), teacher_outputs.flatten(0, 1)
        parts = zip(outputs.split(TOKENS_AT_ONCE), teacher_outputs.split(TOKENS_AT_ONCE), strict=True)
        # Computed again in the backward pass, so that only the log-probabilities of a few tokens are ever in memory.
        sums = [checkpoint(_kl_sum, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return torch.stack(sums).sum() / len(outputs)


def _kl_sum(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return functional.kl_div(student, teacher, reduction="sum", log_target=True)


class LanguageModeling(FineTuning[Settings]):
    """A language model learns to predict the next token: the task of the loop."""

    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    train_data: StreamedBlocks | datasets.Dataset

    def __init__(self, settings: Settings, accelerator: Accelerator) -> None:
        window, number = settings.data.streaming, max(settings.calibration_batches, settings.linear_batches)
        blocks = number * settings.batch_size * accelerator.num_processes
        if window is not None and blocks > window:
            name = "calibration_batches" if number == settings.calibration_batches else "linear.calibration_batches"
            raise ValueError(
                f"settings.{name}: a stream remembers a window of {window} blocks (data.streaming), and these are "
                f"{blocks}; take fewer, or a larger window"
            )
        self.source = {"pretrained_model_name_or_path": settings.model.path, "revision": settings.model.revision or "main"}
        if Path(settings.model.path).is_dir():
            check_tokenizer(settings.model.path)
        self.tokenizer = AutoTokenizer.from_pretrained(**self.source)
        check_vocabulary(self.tokenizer, AutoConfig.from_pretrained(**self.source).get_text_config().vocab_size)
        blocks_written = self._written(settings, accelerator)
        # So that files are downloaded and cached only once.
        with accelerator.main_process_first():
            self.train_data, held_out = self._data(settings.data, blocks_written)
        self.eval_data = {} if held_out is None else {"": held_out}
        super().__init__(settings)
        self.objective, self.eval_batch_size = NextToken(), settings.batch_size

    def load(self, component: str | None) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(**self.source, dtype=self.settings.load_dtype)

    def from_config(self, component: str | None) -> torch.nn.Module:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(**self.source), dtype=torch.float32)

    def model_config(self, component: str | None) -> dict[str, Any]:
        return PreTrainedConfig.get_config_dict(**self.source)[0]

    def fingerprints(self) -> dict[str, str]:
        found = super().fingerprints() | {"the tokenizer of model.path": fingerprint_of_tokenizer(self.tokenizer)}
        text = "the text of data.train" if self.settings.data.generate is None else "the text that the model wrote"
        for name, blocks in ((text, self.train_data), ("the held-out text", self.eval_data.get(""))):
            # A stream checks by itself that the text it has read is unchanged.
            if isinstance(blocks, datasets.Dataset):
                found[name] = fingerprint_of_blocks(blocks)
        return found

    def _written(self, settings: Settings, accelerator: Accelerator) -> datasets.Dataset | None:
        """The blocks of text that the starting model writes; None without `data.generate`."""
        data, generate = settings.data, settings.data.generate
        if generate is None:
            return None
        dtype = torch.float32 if settings.mixed_precision is None else torch.bfloat16

        def load() -> torch.nn.Module:
            model = AutoModelForCausalLM.from_pretrained(**self.source, dtype=dtype).eval()
            move_out_of_files(model)
            if get_handle(model) is not None:
                # One of our exports comes patched; here the settings decide.
                unpatch_model(model)
            if generate.attention == "fp4":
                patch_model(model, settings.qat)
            return model

        origin: dict[str, Any] = {
            "model.path": settings.model.path,
            "model.revision": settings.model.revision,
            "dtype": str(dtype),
        }
        origin["the tokenizer of model.path"] = fingerprint_of_tokenizer(self.tokenizer)
        if generate.attention == "fp4":
            origin["qat"] = to_dict(settings.qat)
        sequences = generated_text(
            generate,
            length=generate.length or data.sequence_length,
            folder=Path(settings.output_dir) / "generated",
            origin=origin,
            tokenizer=self.tokenizer,
            load=load,
            digest=digest_of_weights,
            accelerator=accelerator,
        )
        with accelerator.main_process_first():
            return pack_sequences(sequences, data.sequence_length)

    def _data(
        self, data: TextSettings, written: datasets.Dataset | None
    ) -> tuple[StreamedBlocks | datasets.Dataset, datasets.Dataset | None]:
        if data.streaming is None or data.train is None:
            return load_blocks(data, self.tokenizer, load_chat if data.chat else load_source, written)
        train = StreamedBlocks(data.train, self.tokenizer, data.sequence_length, data.streaming)
        if data.eval is None:
            return train, None
        return train, load_source(data.eval, self.tokenizer, data.sequence_length)

    def batches(self, start: int, stop: int) -> Sampler[list[int]]:
        settings = self.settings
        if isinstance(self.train_data, StreamedBlocks):
            return WindowBatches(self.train_data.window, settings.batch_size, settings.seed, start, stop)
        return ShuffledBatches(len(self.train_data), settings.batch_size, settings.seed, start, stop)

    def data_state(self, batches: int) -> dict[str, Any] | None:
        if isinstance(self.train_data, StreamedBlocks):
            return self.train_data.state_dict(batches * self.settings.batch_size)
        return None

    def restore_data(self, state: dict[str, Any]) -> None:
        if isinstance(self.train_data, StreamedBlocks):
            self.train_data.load_state_dict(state)

    @staticmethod
    def tokens(batch: dict[str, torch.Tensor]) -> int:
        return batch["input_ids"].numel()
