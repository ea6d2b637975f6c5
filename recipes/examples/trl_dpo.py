"""Learning from preferences through 4-bit attention with TRL's DPOTrainer; needs qat-patch[train,trl].

accelerate launch recipes/examples/trl_dpo.py --model_name_or_path Qwen/Qwen3-0.6B \
    --dataset_name trl-lib/ultrafeedback_binarized --bf16 true --output_dir outputs/dpo

Every option is TRL's own (`--help`). `dataset_name` may be a folder with train.jsonl and test.jsonl.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from qat_patch import AttnQATConfig, QuantSpec, patch_model
from qat_recipes.callback import QATCallback


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    script, training, chosen = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config(arguments)
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    # The trainer loads the reference model by the name in the model's config, so the model must not be patched yet.
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(chosen.model_name_or_path, dtype=chosen.dtype),
        args=training,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if training.eval_strategy != "no" else None,
        peft_config=get_peft_config(chosen),
    )
    config = AttnQATConfig(spec=QuantSpec(rotate=True, four_over_six=True))
    print(patch_model(trainer.model, config))
    if trainer.ref_model is not None:
        # Both start as the same policy, so rewards begin at zero. With LoRA the reference is the model itself without adapters.
        patch_model(trainer.ref_model, config)
    trainer.add_callback(QATCallback(trainer, export_dir=f"{training.output_dir}/export"))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)


if __name__ == "__main__":
    main()
