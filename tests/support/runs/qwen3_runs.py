"""Runs of recipes/finetune_qwen3.py on the `inputs` of conftest.py."""

import finetune_qwen3
from support.runs.runs import run

# Three batches an epoch and two a step: every second step spans two epochs, and checkpoint-2 lies inside one.
RUN = {
    "steps": 6,
    "batch_size": 2,
    "accumulation_steps": 2,
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "seed": 3,
    "eval_every": 3,
    "checkpoint_every": 2,
    "keep_checkpoints": 2,
    "data.sequence_length": 64,
    "data.train.blocks": 7,
}
# Without held-out text, checkpoints and the like: steps only.
BARE = {"data.eval.path": ..., "eval_every": 0, "checkpoint_every": 0, "keep_checkpoints": "null", "warmup_steps": 0, "steps": 2}


def settings(inputs, output_dir, **changes):
    places = {"model.path": inputs / "model", "data.train.path": inputs / "train.jsonl", "data.eval.path": inputs / "eval.txt"}
    return RUN | {"output_dir": output_dir} | places | changes


def finetune(inputs, output_dir, **changes):
    return run(finetune_qwen3, settings(inputs, output_dir, **changes))
