"""Is `impl="fp4"` right and faster on this GPU? A program for a process of its own, which a wrong kernel may take down.

    python -m qat_kernels.fp4.self_check '{"device": "cuda:0", "cases": [{"head_dim": 128, "causal": false, ...}]}'

It prints a line of JSON for each case as soon as that is decided, so that whoever started it knows which one took it down.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from qat_kernels import reference
from qat_kernels.mask import Mask
from qat_kernels.spec import QuantSpec
from qat_kernels.triton import launch as training
from qat_kernels.triton.device import arch_of
from qat_kernels.verdicts import Case

from . import launch, machine_code, problems, timing
from .guarded import Guarded
from .identity import identity

OUTPUT_BOUND, LSE_BOUND = 3e-3, 1e-4
"""Of relative L2, and of the largest difference (docs/NUMERICS.md, section 7)."""
_RUNS, _ROWS, _HEADS = 2, 32, 4
"""Sampled rows: so many runs of so many rows, in so many heads; 256 in all."""


class Failed(Exception):
    """The kernel is not to be used; says why."""


def main(arguments: list[str]) -> None:
    """Check every case of the request, one after the other."""
    request = json.loads(arguments[0])
    device, cases = torch.device(request["device"]), request["cases"]
    try:
        about = identity(device)
    except Exception as error:  # no driver, no such GPU, or no room for a context
        for each in cases:
            _say({"case": each, "state": "none", "reason": f"no context on {device}: {_first_line(error)}"})
        return
    for each in cases:
        result, may_go_on = decided(Case.from_dict(each), device)
        _say({"case": each, "identity": about} | result)
        if not may_go_on:
            sys.exit(1)  # what an exception leaves behind on a GPU, nobody knows


def decided(case: Case, device: torch.device) -> tuple[dict[str, Any], bool]:
    """`check`, whatever becomes of it: `state` is `passed`, `failed` `none` (no verdict); and whether the process may go on."""
    try:
        return check(case, device), True
    except Failed as reason:
        return {"state": "failed", "reason": str(reason)}, True
    except Exception as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return {"state": "none", "reason": f"out of memory: {_first_line(error)}"}, False
        return {"state": "failed", "reason": f"it stopped with {type(error).__name__}: {_first_line(error)}"}, False


def check(case: Case, device: torch.device) -> dict[str, Any]:
    """Numbers first, then speed.

    Raises:
        Failed: wrong numbers, other bits the second time, memory that it should not have touched, or machine code without the
            FP4 units that it was compiled for.
    """
    spec, arch = QuantSpec.from_json(case.spec), arch_of(device)
    emulated = launch.why_not_native(arch, case.head_dim, spec.quantizes_pv)
    errors = {}
    for problem in problems.problems(case, device):
        errors[problem.name] = _compare(problem, None if emulated else arch)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    timed = timing.measure(case, device)
    return {
        "state": "passed",
        "reason": None,
        "emulated": emulated,
        "error": max(errors.values()),
        "errors": errors,
        "times": [each._asdict() for each in timed],
        "wins_from": timing.wins_from(timed),
    }


def _compare(problem: problems.Attended, native_arch: int | None) -> float:
    """Relative L2 of O, within all bounds."""
    kernels: list[Any] = []
    first = _guarded(problem, kernels)
    if native_arch is not None:
        for kernel in kernels:
            reason = machine_code.why_not_on_fp4_units(kernel, native_arch, problem.q.shape[-1], problem.spec.quantizes_pv)
            if reason is not None:
                raise Failed(f"not on FP4 units: {reason} ({problem.name})")
    if problem.sampled:
        error = max(_errors(*pair) for pair in _sampled_rows(problem, first))
        if not error < OUTPUT_BOUND:
            raise _wrong(problem.name, "O", error, OUTPUT_BOUND)
    else:
        expected = problem.run(training.forward, with_gradient=False)
        error = _errors(first[0], expected.out)
        if not error < OUTPUT_BOUND:
            raise _wrong(problem.name, "O", error, OUTPUT_BOUND)
        difference = torch.where(first[1] == expected.lse, 0.0, (first[1] - expected.lse).abs()).max().item()
        if not difference < LSE_BOUND:
            raise _wrong(problem.name, "the log-sum-exp", difference, LSE_BOUND)
    again = _guarded(problem, kernels)
    if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        raise Failed(f"wrong: other bits the second time ({problem.name})")
    return error


def _guarded(problem: problems.Attended, kernels: list[Any]) -> launch.Outputs:
    guarded = Guarded()
    outputs = problem.run(launch.forward, allocate=guarded, launched=kernels.append)
    if (found := guarded.problem()) is not None:
        raise Failed(f"wrong: {found} ({problem.name})")
    return outputs


def _wrong(name: str, what: str, error: float, bound: float) -> Failed:
    return Failed(f"wrong: {what} is off by {error:.1e}, expected less than {bound:.0e} ({name})")


def _errors(a: torch.Tensor, b: torch.Tensor) -> float:
    norm = b.float().norm()
    return 0.0 if not norm and torch.equal(a, b) else ((a.float() - b.float()).norm() / norm).item()


def _sampled_rows(problem: problems.Attended, found: launch.Outputs) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """O of some rows, and what the definition makes of them: rows are independent, and of a causal call they begin its tail."""
    (batch, heads, queries, head_dim), (_, heads_k, keys, _) = problem.q.shape, problem.k.shape
    generator = torch.Generator().manual_seed(1)
    places = [(0, 0), (batch - 1, heads - 1)]
    places += [(_random(batch, generator), _random(heads, generator)) for _ in range(_HEADS - 2)]
    for b, h in places:
        for start in [queries - min(_ROWS, queries), *(_random(queries, generator) for _ in range(_RUNS - 1))]:
            start = min(start, max(queries - _ROWS, 0))
            rows, stop = slice(start, start + _ROWS), min(start + _ROWS, queries)
            seen = stop + keys - queries if problem.causal else keys
            k, v = (x[b : b + 1, h * heads_k // heads, None, :seen].float() for x in (problem.k, problem.v))
            q = problem.q[b : b + 1, h : h + 1, rows].float()
            expected, *_ = reference.forward(
                q, k, v, None, None, spec=problem.spec, mask=Mask(causal=problem.causal), scale=head_dim**-0.5, with_out_hp=False
            )
            yield found[0][b : b + 1, h : h + 1, rows], expected


def _random(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=generator))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _say(result: dict[str, Any]) -> None:
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
