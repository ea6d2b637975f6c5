"""Which implementation of 4-bit attention a patched model runs: the user's choice, the self-check's verdicts, and words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import torch

from qat_kernels import QuantSpec
from qat_kernels.arguments import Impl
from qat_kernels.dispatch import SPEED, why_not, without_verdicts
from qat_kernels.verdicts import Verdicts

from .plan import Plan
from .self_check.check import NOT_CHECKED, gpus, known_verdicts, unchecked


def choose_impl(plans: Iterable[Plan], impl: Impl) -> None:
    """Set the implementation of planned models. For `auto` the verdicts of the self-check are read here.

    Raises:
        ValueError: the implementation is unknown, or cannot run on this machine. Then nothing was changed.
    """
    plans = list(plans)
    if impl not in get_args(Impl):
        raise ValueError(f"patch_model: impl: expected one of {', '.join(get_args(Impl))}, got {impl!r}")
    for plan in plans:
        _refuse_what_cannot_run(plan, impl)
    verdicts = known_verdicts() if impl == "auto" else None
    for plan in plans:
        plan.take(impl, verdicts)


def devices_of(plan: Plan) -> list[torch.device]:
    """The GPUs that a model may run on: those that hold its attention; if none does, all."""
    modules = [plan.model.get_submodule(layer.name) for layer in plan.patched]
    here = dict.fromkeys(x.device for module in modules for x in module.parameters())
    return [device for device in here if device.type == "cuda"] or gpus()


def describe_impl(plan: Plan) -> str:
    """The receipt's words about calls without a gradient, on the model's current device."""
    weights = plan.weights
    if plan.impl != "auto" or weights is None or weights.device.type == "meta":
        return f"impl {plan.impl}"
    presets = dict.fromkeys(layer.spec.preset for layer in plan.patched)
    runs = {without_verdicts("auto", weights.device, weights.dtype, preset) for preset in presets}
    base = " and ".join(name for name in SPEED if name in runs)
    if not plan.cases() or base == "eager":
        return f"impl auto: {base or 'nothing'} on {weights.device.type}"
    first = plan.patched[0].impl
    verdicts = first if isinstance(first, Verdicts) else None
    if missing := unchecked(verdicts, weights.device, cases := plan.cases()):
        known = f" for {len(missing)} of {len(cases)} kinds of calls" if len(missing) < len(cases) else ""
        return f"impl auto: {_taken(plan, verdicts) or base} ({NOT_CHECKED}{known and ';' + known})"
    return f"impl auto: {_taken(plan, verdicts) or base}"


def _taken(plan: Plan, verdicts: Verdicts | None) -> str:
    """What `auto` takes where there are verdicts, with the reason if that is not a kernel for inference."""
    if verdicts is None or plan.weights is None:
        return ""
    found = [verdict for case in plan.cases() if (verdict := verdicts.of(plan.weights.device, case)) is not None]
    words = [each.taken if each.wins_from else f"{each.taken} ({each.case.kernel} {each.words})" for each in found]
    return "; ".join(dict.fromkeys(words))


def _refuse_what_cannot_run(plan: Plan, impl: Impl) -> None:
    if impl in ("auto", "eager"):
        return
    weights = plan.weights
    dtype = torch.bfloat16 if weights is None else weights.dtype
    devices = devices_of(plan) or [torch.device("cpu") if weights is None else weights.device]
    specs = list(dict.fromkeys(layer.spec for layer in plan.patched))
    problems = {device: _problem(impl, device, dtype, specs) for device in devices}
    if all(problems.values()):
        device, problem = next(iter(problems.items()))
        others = [name for name in SPEED if _problem(name, device, dtype, specs) is None]
        raise ValueError(
            f"patch_model: impl={impl!r} cannot run a {type(plan.model).__name__} here: {problem}; expected one of "
            + ", ".join(map(repr, ("auto", *others)))
        )


def _problem(impl: str, device: torch.device, dtype: torch.dtype, specs: Iterable[QuantSpec]) -> str | None:
    """Why an implementation cannot run all of these specs, or None."""
    return next((problem for spec in specs if (problem := why_not(impl, device, dtype, spec, False)) is not None), None)
