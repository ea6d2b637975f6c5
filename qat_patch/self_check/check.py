"""The interface of the self-check: check cases on GPUs, and read the verdicts of earlier checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import torch

from qat_kernels import QuantSpec
from qat_kernels.dispatch import needs_triton, on_fp4_units, why_not, without_verdicts
from qat_kernels.verdicts import Case, Verdict, Verdicts

from .child import results
from .ranks import in_a_distributed_run, read_by_rank_0
from .store import keep, kept, key_of

NOT_CHECKED = "FP4 units not checked: run qat-patch doctor --check"


@dataclasses.dataclass(frozen=True)
class Checked:
    """The result of the self-check for one case on one GPU."""

    device: torch.device
    case: Case
    result: dict[str, Any]
    """The child's result."""
    is_kept: bool
    """Whether a verdict was written."""

    @property
    def words(self) -> str:
        """The result for people."""
        return in_words(self.result)

    @property
    def taken(self) -> str:
        """The implementation that `auto` takes now."""
        wins_from = self.result.get("wins_from") if self.is_kept else None
        return Verdict(self.device, self.case, None if wins_from is None else tuple(wins_from), self.words).taken


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """The results of a self-check. `print(report)` is a table."""

    checked: tuple[Checked, ...]

    def __str__(self) -> str:
        titles = ("GPU", "case", "passed", "error", "against SDPA", "auto takes", "result")
        rows = [titles, *(_row(each) for each in self.checked)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
        return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """All results of the child, and whether they were saved, for JSON."""
        return [each.result | {"device": str(each.device), "kept": each.is_kept} for each in self.checked]


def gpus() -> list[torch.device]:
    """The GPUs that this process sees."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def check(devices: Iterable[torch.device], cases: Iterable[Case]) -> CheckReport:
    """Check cases on GPUs in child processes, and save the verdicts. Cases that cannot run on a GPU are skipped there.

    Raises:
        ValueError: none of them can run on any of these GPUs, or this process is one of several; says why. Nothing has been
            started then.
    """
    if in_a_distributed_run():
        raise ValueError(
            "self-check: expected a process alone, got one of a distributed run: they would time each other, and know different "
            "verdicts; run `qat-patch doctor --check`, or handle.check() in a process alone, before"
        )
    devices, cases = list(devices), list(dict.fromkeys(cases))
    if not cases:
        raise ValueError("self-check: expected a preset that a kernel for inference computes; there is nothing to check")
    if not devices:
        raise ValueError("self-check: expected an NVIDIA GPU, got a machine without one; there is nothing to check")
    problems = {(device, case): _problem(device, case) for device, case in product(devices, cases)}
    if all(problems.values()):
        (device, case), problem = next(iter(problems.items()))
        base = without_verdicts("auto", device, case.dtype, QuantSpec.from_json(case.spec).preset)
        raise ValueError(f"self-check: {problem}; there is nothing to check: `auto` takes {base} there")
    checked = []
    for device in devices:
        here = [case for case in cases if problems[device, case] is None]
        for case, result in zip(here, results(str(device), [case.to_dict() for case in here]), strict=True):
            # A result without an identity comes from a child that ended early; the verdict needs one as its key.
            may_keep = result["state"] != "none"
            if may_keep and "identity" not in result:
                result |= {"identity": _identity(device) | _identity_of_kernel(case)}
            is_kept = may_keep and keep(result | {"words": in_words(result)})
            checked.append(Checked(device, case, result, is_kept))
    return CheckReport(tuple(checked))


def known_verdicts() -> Verdicts | None:
    """The verdicts about the GPUs of this process, from here or from rank 0; None if there are none.

    If there is no file, no GPU is touched.
    """
    records = read_by_rank_0(kept)
    if not records:
        return None
    found: list[Verdict] = []
    for device in gpus():
        try:
            identity = _identity(device)
        except (
            ImportError,
            OSError,
            RuntimeError,
            ValueError,
        ):  # a GPU that cannot be used, a forked process, no triton: others report these
            continue
        found += [verdict for record in records if (verdict := _verdict(device, identity, record))]
    return Verdicts(tuple(found)) if found else None


def unchecked(verdicts: Verdicts | None, device: torch.device, cases: Iterable[Case]) -> list[Case]:
    """The cases that could run on FP4 units of a device, but are not checked there yet."""
    return [
        case
        for case in dict.fromkeys(cases)
        if _problem(device, case) is None
        and on_fp4_units(device, case.head_dim, case.dtype, QuantSpec.from_json(case.spec))
        and (verdicts is None or verdicts.of(device, case) is None)
    ]


def in_words(result: dict[str, Any]) -> str:
    """A result for people."""
    if result["state"] != "passed":
        return f"{'failed' if result['state'] == 'failed' else 'no verdict'}: {result['reason']}"
    gains = _gains(result)
    speed = f"{gains[0]:.2f} times as fast as triton at {gains[2]} tokens" if gains else "not timed"
    emulated = f", emulated in BF16 ({result['emulated']})" if result.get("emulated") else ""
    return f"right{emulated}, {speed}" + ("" if result["wins_from"] else ": not faster by enough")


def _gains(result: dict[str, Any]) -> tuple[float, float, int] | None:
    """The speedup over triton and over SDPA at the largest timed number of tokens, and that number."""
    times: Sequence[dict[str, Any]] = result.get("times") or ()
    if not times:
        return None
    last = max(times, key=lambda each: each["queries"] * each["keys"])
    return last["triton"] / last["kernel"], last["sdpa"] / last["kernel"], last["keys"]


def _row(each: Checked) -> tuple[str, ...]:
    result, case, gains = each.result, each.case, _gains(each.result)
    passed = {"passed": "yes", "failed": "no"}.get(result["state"], "no verdict")
    what = f"head_dim {case.head_dim}{', causal' if case.causal else ''}, {str(case.dtype).removeprefix('torch.')}"
    what += "" if case.spec == QuantSpec().to_json() else f", {case.spec}"
    error = f"{result['error']:.1e}" if "error" in result else "-"
    return str(each.device), what, passed, error, f"{gains[1]:.2f} times as fast" if gains else "-", each.taken, each.words


def _problem(device: torch.device, case: Case) -> str | None:
    """Why the kernel of a case cannot run on a device, or None."""
    return why_not(case.kernel or "", device, case.dtype, QuantSpec.from_json(case.spec), False)


def _verdict(device: torch.device, identity: dict[str, str], record: dict[str, Any]) -> Verdict | None:
    """A record's verdict on a device, if it is about the current GPU, software and kernel."""
    wins_from = record.get("wins_from")
    try:
        case = Case.from_dict(record["case"])
    except ValueError:
        return None
    if record["key"] != key_of(identity | _identity_of_kernel(case)):
        return None
    return Verdict(device, case, None if wins_from is None else tuple(wins_from), record.get("words", record["state"]))


def _identity(device: torch.device) -> dict[str, str]:
    with needs_triton():
        from qat_kernels.self_check.identity import identity
    return identity(device)


def _identity_of_kernel(case: Case) -> dict[str, str]:
    with needs_triton():
        from qat_kernels.self_check.identity import of_kernel
    return of_kernel(case.kernel)
