"""Supervised fine-tuning through 4-bit attention with TRL's SFTTrainer, packed, with LoRA or without; needs qat-patch[train,trl].

accelerate launch recipes/examples/trl_sft.py --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \
    --packing true --max_length 4096 --use_peft true --lora_target_modules q_proj k_proj v_proj o_proj \
    --eval_strategy steps --eval_steps 100 --bf16 true --output_dir outputs/sft

Every option is TRL's own (`--help`). `dataset_name` may be a folder with train.jsonl and test.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from qat_patch import AttnQATConfig, QuantSpec, patch_model
from qat_recipes.callback import QATCallback


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    script, training, chosen = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(arguments)
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(chosen.model_name_or_path, dtype=chosen.dtype),
        training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(chosen),
    )
    # Rotation, four over six and K shifts halve what 4-bit attention costs, and Q shifts halve the rest (docs/EVIDENCE.md).
    print(patch_model(trainer.model, AttnQATConfig(spec=QuantSpec(rotate=True, four_over_six=True))))
    trainer.add_callback(QATCallback(trainer, calibration_batches=8, export_dir=f"{training.output_dir}/export"))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)


if __name__ == "__main__":
    main()
