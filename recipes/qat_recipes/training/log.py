"""The log of a run: metrics.jsonl with one line per step, and the trackers of Accelerate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from accelerate import Accelerator

from qat_recipes.command_line import flatten, to_dict, to_yaml

from . import checkpoints
from .settings import TrainingSettings

METRICS, SETTINGS = "metrics.jsonl", "settings.yaml"


class Log:
    """The log of a run. Nothing of a run writes before it."""

    def __init__(self, settings: TrainingSettings, accelerator: Accelerator, checkpoint: Path | None) -> None:
        self.accelerator, self.file = accelerator, Path(settings.output_dir) / METRICS
        self.files = [self.file, self.file.with_name(SETTINGS)]
        """The files that a checkpoint includes."""
        accelerator.wait_for_everyone()  # until all processes have found output_dir free
        if accelerator.is_main_process:
            checkpoints.remove_leftovers(self.file.parent)
            self.file.with_name(SETTINGS).write_text(to_yaml(settings), encoding="utf-8")
            if checkpoint is None:
                # A run that was killed before its first checkpoint may have left one.
                self.file.write_text("", encoding="utf-8")
            else:
                # The log at the time of the checkpoint: later lines will be written again.
                shutil.copyfile(checkpoint / self.file.name, self.file)
        # Trackers accept only numbers and text.
        flat = flatten(to_dict(settings)).items()
        config = {name: value if isinstance(value, int | float | str) else str(value) for name, value in flat}
        accelerator.init_trackers("qat_patch", config=config)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add the measurements of a step; 0 is before the first."""
        self.accelerator.log(values, step=step)
        if self.accelerator.is_main_process:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")

    def summary(self) -> dict[str, float]:
        """The last training loss, and the held-out losses before the first step and after the last, by name."""
        records = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        summary = {"train_loss": next(record["loss"] for record in reversed(records) if "loss" in record)}
        for when, record in (("before", records[0]), ("after", records[-1])):
            summary |= {f"{name}_{when}": value for name, value in record.items() if name.startswith("eval_")}
        return summary
