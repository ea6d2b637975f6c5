"""The patch of one model: it is planned and checked before anything changes, applied, and undone. Adapters know the libraries."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterable, Mapping

import torch

from qat_kernels.arguments import Impl
from qat_kernels.verdicts import Case, Verdicts

from .config import AttnQATConfig
from .first_call import unwatch, watch
from .hosts import ADAPTERS, HostAdapter
from .layer import SHIFTS, AttentionLayer
from .versions import check_version

HANDLE = "_qat_handle"
"""The attribute of a patched model that holds its handle."""
_USUAL_HEAD_DIMS = (64, 128)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclasses.dataclass(eq=False)
class Plan:
    """The patch of one model, before and after `apply`. Plain data, so that a patched model can be copied."""

    host: str
    model: torch.nn.Module
    config: AttnQATConfig
    layers: list[AttentionLayer]
    skipped: dict[str, str]
    impl: Impl = "auto"
    """The implementation that the user asked for."""

    @property
    def adapter(self) -> HostAdapter:
        """The adapter of the host library."""
        return ADAPTERS[self.host]

    @property
    def patched(self) -> list[AttentionLayer]:
        """The layers that run 4-bit attention."""
        return [layer for layer in self.layers if layer.is_patched]

    @property
    def in_force(self) -> bool:
        """Whether this plan's patch is active in the model."""
        handle = self.model.__dict__.get(HANDLE)
        return handle is not None and self in handle.plans.values()

    def replaced(self, layer: AttentionLayer) -> str | None:
        """What has replaced a patched module's attention since the patch, or None."""
        try:
            module = self.model.get_submodule(layer.name)
        except AttributeError:
            return "a model without this module"
        return self.adapter.replaced(module, layer)

    def describe(self, layer: AttentionLayer) -> str:
        """The receipt's words about a patched module."""
        options = [name for name in ("rotate", "four_over_six") if getattr(layer.spec, name)]
        return f"{', '.join([layer.spec.preset, *options, *layer.shifts])} - {self._calls(layer)}"

    def _calls(self, layer: AttentionLayer) -> str:
        """What happened to the calls of a patched module."""
        if self.in_force and (found := self.replaced(layer)):
            return f"LOST: {found} was put in its place after the patch"
        if layer.reached:
            return "reached"
        around = [self.model.get_submodule(name) for name in _prefixes(layer.name)] if self.in_force else []
        called = [other for other in self.patched if other.reached or other.traced]
        if layer.traced or (called and any(module._compiled_call_impl is not None for module in around)):
            return "compiled"
        hooks = [hook for module in around if (hook := self.adapter.skipping_hook(module))]
        if layer.skipped_by or (called and hooks):
            return f"skipped by {layer.skipped_by or hooks[0]}"
        return "not yet called"

    def cases(self) -> list[Case]:
        """The cases of the self-check for the model's inference calls, as far as they are known before a call.

        Presets that no kernel for inference computes have none.
        """
        layers = [layer for layer in self.patched if layer.spec.inference_kernel is not None]
        shapes = {layer: self.adapter.key_shape(self.model.get_submodule(layer.name)) for layer in layers}
        dtype = self.weights.dtype if self.weights is not None else torch.bfloat16
        return list(
            dict.fromkeys(
                Case(head_dim, self.adapter.CAUSAL, layer.spec.to_json(), dtype)
                for layer, shape in shapes.items()
                for head_dim in (_USUAL_HEAD_DIMS if shape is None else shape[1:])
            )
        )

    @property
    def weights(self) -> torch.Tensor | None:
        """A floating-point weight of patched attention, which shows the device and dtype. Quantized weights do not count."""
        modules = [self.model.get_submodule(layer.name) for layer in self.patched]
        return next((x for module in [*modules, self.model] for x in module.parameters() if x.dtype in _DTYPES), None)

    def take(self, impl: Impl, verdicts: Verdicts | None) -> None:
        """Set the implementation of calls from now on: `impl`; for `auto` with the verdicts."""
        self.impl = impl
        for layer in self.patched:
            layer.impl = verdicts if impl == "auto" and verdicts is not None else impl

    def apply(self) -> None:
        """Patch the model, and watch the first call of each module."""
        self.adapter.apply(self.model, self.layers)
        watch(self.host, self.model, self.patched)


def _prefixes(name: str) -> list[str]:
    """A module's name and those of the modules around it, from the inside out; the model itself is last."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts), -1, -1)]


def make_plan(host: str, model: torch.nn.Module, config: AttnQATConfig | None, *, given: Collection[str]) -> Plan:
    """Decide what to do with every attention module of a model. Raises a ValueError if that is impossible; changes nothing.

    `given`: the kinds of shifts (`SHIFTS`) that the caller has passed.
    """
    adapter = ADAPTERS[host]
    check_version("patch_model", sys.modules[host])
    if config is None and (metadata := adapter.stored_metadata(model)) is not None:
        if missing := [which for which in metadata.shifts if which not in given]:
            kinds = " and ".join(f"{SHIFTS[which]}s" for which in missing)
            raise ValueError(
                f"patch_model: {type(model).__name__} comes from an export with {kinds}, which are in a file next to its "
                f"weights: expected {' and '.join(missing)}, got none; load_checkpoint brings them along "
                f"(get_handle(model).shifts), or pass {', '.join(f'{which}={{}}' for which in missing)} to do without"
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
        layers.append(AttentionLayer(name=name, spec=spec, is_patched=is_patched, original=original, prepare=adapter.prepare))
    if refused:
        raise ValueError(_refusal(model, config, refused, is_all=len(refused) == sum(layer.is_patched for layer in layers)))
    config.check_overrides(layer.name for layer in layers if layer.is_patched)
    return Plan(
        host=host, model=model, config=config, layers=layers, skipped={name: skipped[name] for name in names if name in skipped}
    )


def _refusal(model: torch.nn.Module, config: AttnQATConfig, refused: dict[str, str], *, is_all: bool) -> str:
    """The message about modules that cannot be patched, with the config that excludes them, if any module is left."""
    by_problem: dict[str, list[str]] = {}
    for name, problem in refused.items():
        by_problem.setdefault(problem, []).append(name)
    problems = "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {problem}" for problem, names in by_problem.items()
    )
    exclude = [*config.exclude, *refused]
    found = f"patch_model: {type(model).__name__} has {len(refused)} modules that 4-bit attention cannot do: {problems}"
    return f"{found}; no other is left" if is_all else f"{found}; or leave them out: AttnQATConfig(exclude={exclude!r})"


def set_shifts(plans: dict[str, Plan], which: str, shifts: Mapping[str, torch.Tensor]) -> None:
    """Set shifts of one kind (`SHIFTS`), by prefixed name. Raises a ValueError for what is not a shift of a patched module."""
    layers = {prefix + layer.name: layer for prefix, plan in plans.items() for layer in plan.patched}
    shapes = {
        prefix + layer.name: plan.adapter.key_shape(plan.model.get_submodule(layer.name))
        for prefix, plan in plans.items()
        for layer in plan.patched
    }
    for name, shift in shifts.items():
        if name not in layers:
            raise ValueError(
                f"patch_model: {which}: expected names of modules that are patched, such as {next(iter(layers))}, got {name!r}"
            )
        if not isinstance(shift, torch.Tensor) or shift.dtype != torch.float32 or shift.ndim != 2:
            got = f"{shift.dtype} {list(shift.shape)}" if isinstance(shift, torch.Tensor) else repr(shift)
            raise ValueError(f"patch_model: {which}[{name!r}]: expected float32 [key heads, head_dim], got {got}")
        if shapes[name] not in (None, tuple(shift.shape)):
            raise ValueError(
                f"patch_model: {which}[{name!r}]: expected [key heads, head_dim] of this module, {list(shapes[name] or ())}, got "
                f"{list(shift.shape)}; measure it on this model"
            )
        setattr(layers[name], which, shift.detach())


def restore(plans: Iterable[Plan]) -> None:
    """Undo the active plans."""
    for plan in plans:
        if plan.in_force:
            unwatch(plan.model)
            plan.adapter.restore(plan.model, plan.layers)
            delattr(plan.model, HANDLE)
