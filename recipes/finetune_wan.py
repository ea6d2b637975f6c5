"""Fine-tune the transformer of a Wan pipeline for 4-bit attention, on clips that `qat-patch prepare-wan-data` encoded.

accelerate launch --quiet recipes/finetune_wan.py --config recipes/configs/wan2_1_1_3b.yaml learning_rate=1e-5

A mistake in settings or data gives one line and exit status 1; without `--quiet` accelerate adds a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

from qat_recipes.command_line import read_settings, run
from qat_recipes.tasks.video_diffusion import Settings, VideoDiffusion
from qat_recipes.training.loop import train


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train as the command line says. Returns the measured losses."""
    settings = read_settings(Settings, arguments)
    return train(settings, lambda accelerator: VideoDiffusion(settings, accelerator))


if __name__ == "__main__":
    run(main)
