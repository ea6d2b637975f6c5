"""Fine-tune a causal language model of Transformers for 4-bit attention: Qwen3, or any other that qat_patch can patch.

accelerate launch --quiet recipes/finetune_qwen3.py --config recipes/configs/qwen3_14b.yaml learning_rate=1e-5

A mistake in settings or data gives one line and exit status 1; without `--quiet` accelerate adds a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

from qat_recipes.command_line import read_settings, run
from qat_recipes.tasks.language_modeling import LanguageModeling, Settings
from qat_recipes.training.loop import train


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the command line says. Returns the measured losses."""
    settings = read_settings(Settings, arguments)
    return train(settings, lambda accelerator: LanguageModeling(settings, accelerator))


if __name__ == "__main__":
    run(main)
