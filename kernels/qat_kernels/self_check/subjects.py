"""What is checked: the kernels for inference, how far their results may be off, and how a call of each is watched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from qat_kernels import sageattn3
from qat_kernels.fp4 import launch, machine_code
from qat_kernels.spec import QuantSpec
from qat_kernels.triton.device import arch_of
from qat_kernels.verdicts import Case

from .guarded import Guarded
from .problems import Attended


class Failed(Exception):
    """The kernel is not to be used; says why."""


class Bounds(NamedTuple):
    """How far results may be off (docs/NUMERICS.md, sections 7 and 9)."""

    output: float
    """Relative L2 of O."""
    row: float
    """Relative L2 of each row of O."""
    lse: float
    """The largest difference of the log-sum-exp."""


class Subject(Protocol):
    """A kernel as the check knows it."""

    bounds: Bounds
    tensors: int
    """As `problems` takes it."""

    def emulated(self, case: Case, device: torch.device) -> str | None:
        """Why it does not multiply on FP4 units, if it does not."""

    def forward(self, *args: Any, **options: Any) -> Any:
        """Its launcher."""

    def watched(self, problem: Attended) -> tuple[torch.Tensor, ...]:
        """O, and LSE if it has one, of a call that is seen to do nothing else.

        Raises:
            Failed: it left something out, wrote where nothing is its own, or is not on FP4 units where it should be.
        """


class Fp4:
    """This package's own kernel."""

    bounds = Bounds(3e-3, math.inf, 1e-4)
    tensors = 3
    """The largest problem's input, and O twice."""

    def emulated(self, case: Case, device: torch.device) -> str | None:
        """As the launcher decides."""
        return launch.why_not_native(arch_of(device), case.head_dim, QuantSpec.from_json(case.spec).quantizes_pv)

    def forward(self, *args: Any, **options: Any) -> Any:
        """`fp4/launch.py`."""
        return launch.forward(*args, **options)

    def watched(self, problem: Attended) -> tuple[torch.Tensor, ...]:
        """Outputs are NaN before and lie between guard bands, and the machine code is looked at."""
        guarded, kernels = Guarded(), list[Any]()
        outputs = problem.run(launch.forward, allocate=guarded, launched=kernels.append)
        if (found := guarded.problem()) is not None:
            raise Failed(f"wrong: {found} ({problem.name})")
        arch, head_dim, quantize_pv = arch_of(problem.q.device), problem.q.shape[-1], problem.spec.quantizes_pv
        for kernel in kernels if launch.why_not_native(arch, head_dim, quantize_pv) is None else ():
            if (reason := machine_code.why_not_on_fp4_units(kernel, arch, head_dim, quantize_pv)) is not None:
                raise Failed(f"not on FP4 units: {reason} ({problem.name})")
        return outputs


class SageAttention3:
    """The kernel of others. It returns only O, in memory that it allocates."""

    bounds = Bounds(0.05, 0.15, math.inf)
    tensors = 12
    """The largest problem's input, its copies, centred and padded ones among them, scores of the means, and O three times."""

    def emulated(self, case: Case, device: torch.device) -> str | None:
        """It has no other way."""
        return None

    def forward(self, *args: Any, **options: Any) -> Any:
        """`sageattn3.py`."""
        return sageattn3.forward(*args, **options)

    def watched(self, problem: Attended) -> tuple[torch.Tensor, ...]:
        """All memory that it allocates is filled with NaN first, and it must not write into its inputs."""
        if not problem.sampled:  # contiguous, so that it is given these tensors and no copies
            problem = problem._replace(q=problem.q.contiguous(), k=problem.k.contiguous(), v=problem.v.contiguous())
        given = () if problem.sampled else (problem.q, problem.k, problem.v)
        before = [x.clone() for x in given]
        with nan_in_new_memory():
            out, _ = problem.run(sageattn3.forward)
        if not all(map(torch.equal, given, before)):
            raise Failed(f"wrong: it wrote into its inputs ({problem.name})")
        if any(bool(part.isnan().any()) for part in out.split(1)):
            raise Failed(f"wrong: it left or computed NaN in O ({problem.name})")
        return (out,)


SUBJECTS: dict[str, Subject] = {"fp4": Fp4(), "sageattn3": SageAttention3()}
"""By `Case.kernel`."""


@contextlib.contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Inside, PyTorch fills memory with NaN, or the largest integer, when it allocates it, for whoever asks."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
