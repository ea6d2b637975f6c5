"""Both transformers of Wan 2.2 in one run: one model for the loop. Each step trains the transformer for its noise level."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import Dataset

from qat_recipes.data.video import Draw, EncodedClips


class Experts(torch.nn.Module):
    """The transformers of a pipeline by name; the argument `expert` of a call selects one."""

    def __init__(self, transformers: Mapping[str, torch.nn.Module]) -> None:
        super().__init__()
        for name, transformer in transformers.items():
            self.add_module(name, transformer)
        classes = {type(transformer).__name__ for transformer in transformers.values()}
        blocks = {name for x in transformers.values() for name in getattr(x, "_no_split_modules", None) or ()}
        # The units of sharding. The transformers themselves are units too, because pipelines call them without this module.
        self._no_split_modules = sorted(classes | blocks)

    def forward(self, *, expert: str, **arguments: Any) -> Any:
        """The output of the transformer of this name."""
        return self.get_submodule(expert)(**arguments)


class ClipsInTurns(Dataset):
    """Encoded clips, each with the `expert` that the step trains.

    All clips of a step have the same, in every process. It is drawn for each step, and depends on the seed and the number of the
    step alone.

    Args:
        clips: by index.
        shares: how often each expert is drawn, by name.
        seed: the seed of the draws.
        samples_a_step: the samples in a step, of all processes.
    """

    def __init__(self, clips: EncodedClips, shares: Mapping[str, float], seed: int, samples_a_step: int) -> None:
        self.clips, self.shares, self.seed, self.samples_a_step = clips, dict(shares), seed, samples_a_step

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: Draw) -> dict[str, Any]:
        step = index.number // self.samples_a_step
        draw = random.Random(f"experts {self.seed} {step}")
        (expert,) = draw.choices([*self.shares], weights=[*self.shares.values()])
        return {**self.clips[index], "expert": expert}
