"""Continued pretraining through 4-bit attention with Transformers' own Trainer; needs qat-patch[qwen,train].

accelerate launch recipes/examples/trainer.py --model Qwen/Qwen3-0.6B --data texts --bf16 true \
    --eval_strategy steps --eval_steps 100 --save_steps 100 --output_dir outputs/pretraining

All other options are those of TrainingArguments (`--help`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorWithFlattening,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from qat_patch import AttnQATConfig, QuantSpec, patch_model
from qat_recipes.callback import QATCallback


@dataclasses.dataclass
class Arguments:
    """The model and its data."""

    model: str = dataclasses.field(metadata={"help": "Name on the Hub, or a folder."})
    data: str = dataclasses.field(metadata={"help": "Name on the Hub, or a folder: rows of `text`, in train and test."})
    max_length: int = dataclasses.field(default=2048, metadata={"help": "Longer texts are cut."})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    chosen, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    data = load_dataset(chosen.data).map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=chosen.max_length), remove_columns=["text"]
    )
    model = AutoModelForCausalLM.from_pretrained(chosen.model)
    print(patch_model(model, AttnQATConfig(spec=QuantSpec(rotate=True, four_over_six=True))))
    # Texts are packed one after another, without padding; none sees another. Packed texts need use_cache=False.
    model.config.use_cache = False
    trainer = Trainer(
        model,
        training,
        DataCollatorWithFlattening(return_flash_attn_kwargs=True),
        train_dataset=data["train"],
        eval_dataset=data["test"] if training.eval_strategy != "no" else None,
        processing_class=tokenizer,
    )
    trainer.add_callback(QATCallback(trainer, calibration_batches=8, export_dir=f"{training.output_dir}/export"))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)


if __name__ == "__main__":
    main()
