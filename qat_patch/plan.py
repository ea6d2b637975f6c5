"""What a patch does to one model: planned and checked before anything changes, and undone. Adapters know the host libraries."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import torch

from .config import AttnQATConfig
from .hosts import ADAPTERS, HostAdapter
from .layer import AttentionLayer

HANDLE = "_qat_handle"
"""The attribute of a patched model that holds its handle."""


@dataclasses.dataclass(eq=False)
class Plan:
    """What to do to one model, and after `apply` what was done. Plain data, so that a patched model can be copied."""

    host: str
    model: torch.nn.Module
    config: AttnQATConfig
    layers: list[AttentionLayer]
    skipped: dict[str, str]

    @property
    def adapter(self) -> HostAdapter:
        """How the host library is handled."""
        return ADAPTERS[self.host]

    @property
    def patched(self) -> list[AttentionLayer]:
        """The layers that run 4-bit attention."""
        return [layer for layer in self.layers if layer.is_patched]

    @property
    def in_force(self) -> bool:
        """Whether the model is patched by this plan."""
        handle = self.model.__dict__.get(HANDLE)
        return handle is not None and self in handle.plans.values()

    def describe(self, layer: AttentionLayer) -> str:
        """What the receipt says about a patched module."""
        options = [name for name in ("rotate", "four_over_six") if getattr(layer.spec, name)]
        options += ["k_shift"] if layer.k_shift is not None else []
        found = self.adapter.replaced(self.model, layer) if self.in_force else None
        lost = f" - LOST: {found} was put in its place after the patch" if found else ""
        return ", ".join([f"QK nvfp4, PV {layer.spec.pv}", *options]) + lost


def make_plan(host: str, model: torch.nn.Module, config: AttnQATConfig | None, *, with_shifts: bool) -> Plan:
    """Decides for every attention module of a model, and refuses with a ValueError what cannot be; changes nothing."""
    adapter = ADAPTERS[host]
    if config is None and (metadata := adapter.stored_metadata(model)) is not None:
        if metadata.k_shift is not None and not with_shifts:
            raise ValueError(
                f"patch_model: {type(model).__name__} comes from an export with K shifts, which stand in a file beside its "
                "weights: expected k_shift, got none; load_checkpoint brings them along (get_handle(model).k_shift), or pass "
                "k_shift={} to do without"
            )
        config = metadata.config
    config = config or AttnQATConfig()
    names = adapter.attention_modules(model)
    if not names:
        raise ValueError(
            f"patch_model: found no attention in {type(model).__name__} that goes through {adapter.MECHANISM}; "
            "only such attention can be patched"
        )
    config.check_patterns(names)
    skipped = {name: reason for name, module in names.items() if (reason := adapter.reason_to_skip(module)) is not None}
    skipped |= config.reasons_to_skip(name for name in names if name not in skipped)
    layers: list[AttentionLayer] = []
    refused: dict[str, str] = {}
    for name, module in names.items():
        spec, is_patched = config.spec_of(name), name not in skipped
        if is_patched and (problem := adapter.problem(module, spec)) is not None:
            refused[name] = problem
        original = adapter.original(model, module)
        layers.append(AttentionLayer(name=name, spec=spec, is_patched=is_patched, original=original))
    if refused:
        raise ValueError(_refusal(model, config, refused))
    config.check_overrides(layer.name for layer in layers if layer.is_patched)
    return Plan(
        host=host, model=model, config=config, layers=layers, skipped={name: skipped[name] for name in names if name in skipped}
    )


def _refusal(model: torch.nn.Module, config: AttnQATConfig, refused: dict[str, str]) -> str:
    """What cannot be patched, and the call that leaves it out."""
    by_problem: dict[str, list[str]] = {}
    for name, problem in refused.items():
        by_problem.setdefault(problem, []).append(name)
    problems = "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {problem}" for problem, names in by_problem.items()
    )
    exclude = [*config.exclude, *refused]
    return (
        f"patch_model: {type(model).__name__} has {len(refused)} modules that 4-bit attention cannot do: {problems}; "
        f"or leave them out: AttnQATConfig(exclude={exclude!r})"
    )


def set_shifts(plans: dict[str, Plan], shifts: Mapping[str, torch.Tensor]) -> None:
    """Give layers their K shifts, by prefixed name; raises a ValueError for what is no shift of a patched module."""
    layers = {prefix + layer.name: layer for prefix, plan in plans.items() for layer in plan.patched}
    for name, shift in shifts.items():
        if name not in layers:
            raise ValueError(
                f"patch_model: k_shift: expected names of modules that are patched, such as {next(iter(layers))}, got {name!r}"
            )
        if not isinstance(shift, torch.Tensor) or shift.dtype != torch.float32 or shift.ndim != 2:
            got = f"{shift.dtype} {list(shift.shape)}" if isinstance(shift, torch.Tensor) else repr(shift)
            raise ValueError(f"patch_model: k_shift[{name!r}]: expected float32 [key heads, head_dim], got {got}")
        layers[name].k_shift = shift.detach()


def restore(plans: Iterable[Plan]) -> None:
    """Undo those plans that are in force."""
    for plan in plans:
        if plan.in_force:
            plan.adapter.restore(plan.model, plan.layers)
            delattr(plan.model, HANDLE)
