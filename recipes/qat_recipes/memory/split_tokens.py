"""One sample on several GPUs: its tokens are split over a group of processes, which all see the same samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import Dataset, Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """How several GPUs share one sample."""

    ulysses: int
    """Split the tokens of each sample over this many GPUs. They exchange tokens for heads around self-attention (Ulysses), so a
    step takes less memory and time, and sees fewer samples by this factor. A divisor of the number of GPUs and of that of the
    heads. Needs FSDP2."""

    def __post_init__(self) -> None:
        if self.ulysses < 2:
            raise ValueError(f"parallel.ulysses: expected at least 2, or parallel=null, got {self.ulysses}")


def ulysses_mesh(processes: int, degree: int, device_type: str) -> DeviceMesh:
    """The processes as groups of `degree` neighbours. All processes call this.

    Raises:
        ValueError: they cannot be grouped this way.
    """
    if processes % degree:
        raise ValueError(f"parallel.ulysses: expected a divisor of the {processes} processes, got {degree}")
    return init_device_mesh(device_type, (processes // degree, 1, degree), mesh_dim_names=("replicas", "ring", "ulysses"))


def split_tokens(model: Any, mesh: DeviceMesh) -> None:
    """Make an unpatched Diffusers transformer split its tokens over a group. All processes call this.

    Its gradients then come only from the tokens of this process: those of a group must be summed.
    """
    from diffusers import ContextParallelConfig

    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=mesh["ulysses"].size(), mesh=mesh))


class RepeatedBatches(Sampler[Any]):
    """Batches, each several times in a row, so that neighbours, which take them in turn, get the same.

    Args:
        batches: a batch sampler with `batch_size`, whose batches are all full.
        times: the number of neighbours.
    """

    drop_last = True

    def __init__(self, batches: Any, times: int) -> None:
        self.batches, self.times, self.batch_size = batches, times, batches.batch_size

    def __len__(self) -> int:
        return len(self.batches) * self.times

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            for _ in range(self.times):
                yield batch


class RepeatedSamples(Dataset[Any]):
    """The same for samples that are read in order, in batches of one."""

    def __init__(self, samples: Any, times: int) -> None:
        self.samples, self.times = samples, times

    def __len__(self) -> int:
        return len(self.samples) * self.times

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index // self.times]
