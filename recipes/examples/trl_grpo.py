"""Reinforcement learning through 4-bit attention with TRL's GRPOTrainer, from the FP4 cache; needs qat-patch[train,trl].

accelerate launch recipes/examples/trl_grpo.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name questions \
    --max_completion_length 512 --bf16 true --output_dir outputs/grpo

Every option is TRL's own (`--help`). `dataset_name` is a folder with train.jsonl, or a dataset on the Hub, with rows of `prompt`
and `answer`; a right completion ends with the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from qat_patch import AttnQATConfig, QuantSpec, patch_model
from qat_recipes.callback import QATCallback


def is_right(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 for a completion that ends with the answer, else 0."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [float(text.strip().endswith(right.strip())) for text, right in zip(texts, answer, strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    script, training, chosen = TrlParser((ScriptArguments, GRPOConfig, ModelConfig)).parse_args_and_config(arguments)
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(chosen.model_name_or_path, dtype=chosen.dtype),
        is_right,
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(chosen),
    )
    config = AttnQATConfig(spec=QuantSpec(rotate=True, four_over_six=True))
    handle = patch_model(trainer.model, config)
    print(handle)
    if trainer.ref_model is not None:  # with beta, and without LoRA
        patch_model(trainer.ref_model, config)
    trainer.add_callback(QATCallback(trainer, export_dir=f"{training.output_dir}/export"))
    # Rollouts are sampled with the same attention that the trainer computes: it sees the same quantized keys and values.
    with handle.cached():
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)


if __name__ == "__main__":
    main()
