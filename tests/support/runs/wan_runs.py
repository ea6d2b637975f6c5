"""Runs of the recipe for Wan on tiny pipelines: their inputs and their settings."""

import shutil

import torch

import finetune_wan
from support.models.tiny_clips import write_clips
from support.models.tiny_wan import tiny_pipeline
from support.runs.runs import log, run

RUN = {"steps": 4, "batch_size": 2, "learning_rate": 3e-3, "seed": 3, "eval_timesteps": 2}
RUN |= {"eval_every": 4, "checkpoint_every": 2, "distillation": 0.5}
# Without held-out clips and checkpoints: steps only.
BARE = {"data.eval": ..., "eval_every": 0, "checkpoint_every": 0, "steps": 2, "distillation": 0}
KINDS = {
    "full": {"model.gradient_checkpointing": "true", "samples.every": 4, "samples.clips": 1, "samples.inference_steps": 2},
    "lora": {"lora.rank": 4, "lora.alpha": 8, "lora.dropout": 0.1},
}


def loud(transformer):
    """With attention so strong that 4 bits show, and values so far from zero that what they show can be unlearned."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "to_v.bias" in name:
                parameter += 8 * torch.randn_like(parameter)
            if "to_out.0.weight" in name:
                parameter *= 4
    return transformer


def write_inputs(folder):
    """Pipelines t2v/ and i2v/, the transformer bare/, and encoded clips t2v-train/, i2v-train/ and eval/."""
    for name, i2v in (("t2v", False), ("i2v", True)):
        pipe = tiny_pipeline(i2v, layers=1)
        loud(pipe.transformer)
        pipe.save_pretrained(folder / name)
        write_clips(folder / f"{name}-train", 7, i2v)
    write_clips(folder / "eval", 2, seed=5)
    shutil.copytree(folder / "t2v" / "transformer", folder / "bare")
    return folder


def settings(inputs, output_dir, **changes):
    places = {"model.path": inputs / "t2v", "data.train": inputs / "t2v-train", "data.eval": inputs / "eval"}
    return places | RUN | {"output_dir": output_dir} | changes


def finetune(inputs, output_dir, **changes):
    run(finetune_wan, settings(inputs, output_dir, **changes))
    return log(output_dir)
