"""Is a kernel for inference right and faster on this GPU? Numbers first, then speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from qat_kernels import reference
from qat_kernels.mask import Mask
from qat_kernels.spec import SMOOTH_BLOCK
from qat_kernels.triton import launch as training
from qat_kernels.verdicts import Case

from . import problems, timing
from .subjects import SUBJECTS, Failed, Subject

_RUNS, _ROWS, _HEADS = 2, 32, 4
"""Sampled rows: the numbers of runs, of rows in a run, and of heads; 256 rows in all."""


def decided(case: Case, device: torch.device) -> tuple[dict[str, Any], bool]:
    """`check` with every outcome: `state` is `passed`, `failed` or `none` (no verdict); and whether the process can continue."""
    try:
        return check(case, device), True
    except Failed as reason:
        return {"state": "failed", "reason": str(reason)}, True
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return {"state": "none", "reason": f"out of memory: {first_line(error)}"}, False
        return {"state": "failed", "reason": f"it stopped with {type(error).__name__}: {first_line(error)}"}, False


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Every problem, then the times.

    Raises:
        Failed: wrong numbers, other bits the second time, memory that it should not have touched, or machine code without the
            FP4 units that it was compiled for.
    """
    subject, errors = SUBJECTS[case.kernel or ""], {}
    for problem in problems.problems(case, device, tensors=subject.tensors):
        errors[problem.name] = _compare(subject, problem)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    timed = timing.measure(subject.forward, case, device)
    return {
        "state": "passed",
        "reason": None,
        "emulated": subject.emulated(case, device),
        "error": max(errors.values()),
        "errors": errors,
        "times": [each._asdict() for each in timed],
        "wins_from": timing.wins_from(timed),
    }


def _compare(subject: Subject, problem: problems.Attended) -> float:
    """Relative L2 of O, within all bounds."""
    first, bounds = subject.watched(problem), subject.bounds
    if problem.sampled:
        pairs = list(_sampled_rows(problem, first[0]))
    else:
        expected = problem.run(training.forward, with_gradient=False)
        pairs = [(first[0], expected.out)]
    error = max(_errors(*pair) for pair in pairs)
    if not error < bounds.output:
        raise _wrong(problem.name, "O", error, bounds.output)
    row = max(_errors_of_rows(*pair) for pair in pairs)
    if not row < bounds.row:
        raise _wrong(problem.name, "a row of O", row, bounds.row)
    if not problem.sampled and len(first) > 1:
        difference = torch.where(first[1] == expected.lse, 0.0, (first[1] - expected.lse).abs()).max().item()
        if not difference < bounds.lse:
            raise _wrong(problem.name, "the log-sum-exp", difference, bounds.lse)
    again = subject.watched(problem)
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        raise Failed(f"wrong: other bits the second time ({problem.name})")
    return error


def _wrong(name: str, what: str, error: float, bound: float) -> Failed:
    return Failed(f"wrong: {what} is off by {error:.1e}, expected less than {bound:g} ({name})")


def _errors(a: torch.Tensor, b: torch.Tensor) -> float:
    norm = b.float().norm()
    return 0.0 if not norm and torch.equal(a, b) else ((a.float() - b.float()).norm() / norm).item()


def _errors_of_rows(a: torch.Tensor, b: torch.Tensor) -> float:
    difference, norm = (a.float() - b.float()).norm(dim=-1), b.float().norm(dim=-1)
    return torch.where(difference == 0, 0.0, difference / norm).max().item()


def _sampled_rows(problem: problems.Attended, found: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """O of some rows, and what the definition makes of them: of a causal call they begin its tail.

    Rows are independent, except those that are smoothed together: these are computed together.
    """
    (batch, heads, queries, head_dim), (_, heads_k, keys, _) = problem.q.shape, problem.k.shape
    smooth = problem.spec.formats.smooth is not None
    generator = torch.Generator().manual_seed(1)
    places = [(0, 0), (batch - 1, heads - 1)]
    places += [(_random(batch, generator), _random(heads, generator)) for _ in range(_HEADS - 2)]
    for b, h in places:
        for start in [queries - min(_ROWS, queries), *(_random(queries, generator) for _ in range(_RUNS - 1))]:
            start = min(start, max(queries - _ROWS, 0))
            stop = min(start + _ROWS, queries)
            seen = stop + keys - queries if problem.causal else keys
            first, last = (start, stop) if not smooth else (start // SMOOTH_BLOCK * SMOOTH_BLOCK, _end_of_block(stop, queries))
            q = problem.q[b : b + 1, h : h + 1, first:last]
            k, v = (x[b : b + 1, h * heads_k // heads, None, :seen] for x in (problem.k, problem.v))
            if not smooth:  # which rounds to the dtype of the inputs
                q, k, v = q.float(), k.float(), v.float()
            expected, *_ = reference.forward(
                q, k, v, None, None, None,
                spec=problem.spec, mask=Mask(causal=problem.causal), scale=head_dim**-0.5, with_out_hp=False,
            )  # fmt: skip
            yield found[b : b + 1, h : h + 1, start:stop], expected[:, :, start - first : stop - first]


def _end_of_block(stop: int, queries: int) -> int:
    return min(-(-stop // SMOOTH_BLOCK) * SMOOTH_BLOCK, queries)


def _random(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))


def first_line(error: BaseException) -> str:
    """What an error says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
