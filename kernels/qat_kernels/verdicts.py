"""The verdicts of the self-check about kernels for inference on this machine's GPUs, as plain data, and their use by `auto`."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from .spec import InferenceKernel, QuantSpec


class Case(NamedTuple):
    """One case of the self-check: it has its own kernel or its own speed."""

    head_dim: int
    causal: bool
    spec: str
    """`QuantSpec.to_json()`."""
    dtype: torch.dtype

    @property
    def kernel(self) -> InferenceKernel | None:
        """The kernel that is checked: the one that computes the spec."""
        return QuantSpec.from_json(self.spec).inference_kernel

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        """The case that `to_dict` wrote.

        Raises:
            ValueError: torch has no such dtype, or no kernel computes the spec.
        """
        dtype = getattr(torch, values["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"Case: expected the name of a dtype of torch, got {values['dtype']!r}")
        case = cls(values["head_dim"], values["causal"], values["spec"], dtype)
        try:
            kernel = case.kernel
        except (TypeError, ValueError):  # no JSON, or fields that no spec has
            kernel = None
        if kernel is None:
            raise ValueError(f"Case: expected a spec that a kernel for inference computes, got {case.spec!r}")
        return case


class Verdict(NamedTuple):
    """The result of the check of one case on one GPU."""

    device: torch.device
    case: Case
    wins_from: tuple[int, int] | None
    """Queries and keys of the smallest call from which the kernel is right and faster than `triton`; None: it is not used."""
    words: str
    """The result for people: `right; ...` or `failed: ...`."""

    @property
    def taken(self) -> str:
        """What `auto` takes, in words."""
        if self.wins_from is None:
            return "triton"
        queries, keys = self.wins_from
        return f"{self.case.kernel} from {queries} queries and {keys} keys on, else triton"


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """`impl=verdicts` is `impl="auto"` that uses the kernel for inference where it passed the check and is faster.

    They are valid in the process that read them. Pickled, they become `"auto"`: another process may have other GPUs.
    """

    found: tuple[Verdict, ...]
    win: bool = dataclasses.field(init=False, repr=False, compare=False)
    """Whether a kernel wins anywhere; if not, calls cost the host no more than with `"auto"`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "win", any(each.wins_from is not None for each in self.found))

    def of(self, device: torch.device, case: Case) -> Verdict | None:
        """The verdict on a case, if it was checked."""
        return next((each for each in self.found if each.device == device and each.case == case), None)

    def take_kernel(
        self, device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool, spec: str, queries: int, keys: int
    ) -> bool:
        """Whether a call of this size runs the kernel for inference. torch.compile traces this: sizes may be symbolic."""
        for on, case, wins_from, _ in self.found:
            if wins_from is None or case.head_dim != head_dim or case.causal != causal or case.dtype != dtype:
                continue
            if on == device and case.spec == spec:
                return queries >= wins_from[0] and keys >= wins_from[1]
        return False

    def __copy__(self) -> Verdicts:
        return self

    def __deepcopy__(self, memo: object) -> Verdicts:
        return self

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, ("auto",)
