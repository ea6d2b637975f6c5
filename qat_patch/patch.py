"""patch_model: plan, check, apply, receipt. Knows how to patch; the adapters know the host libraries."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from . import diffusers_adapter, transformers_adapter
from .config import AttnQATConfig
from .layer import AttentionCall, AttentionLayer

_ADAPTERS = {"transformers": transformers_adapter, "diffusers": diffusers_adapter}
_HANDLE = "_qat_handle"


class PatchHandle:
    """A patch in force: what it did, a way to switch it off for a while, and the way back.

    `print(handle)` is the receipt. As a context manager it unpatches on exit.
    """

    def __init__(self, plans: dict[str, _Plan]) -> None:
        self._plans = plans
        """By the prefix of their module names: what tells the models of a pipeline apart."""

    @property
    def config(self) -> AttnQATConfig:
        """The config that was applied; where the models of a pipeline were patched one by one, the first one's."""
        return next(iter(self._plans.values())).config

    @property
    def host(self) -> str:
        """The library of the patched models: `transformers` or `diffusers`."""
        return next(iter(self._plans.values())).host

    @property
    def models(self) -> list[torch.nn.Module]:
        """The models of the host library that are patched; one, or the parts of a pipeline."""
        return [plan.model for plan in self._plans.values()]

    @property
    def patched(self) -> dict[str, AttentionLayer]:
        """The modules that run 4-bit attention, by name."""
        return {
            prefix + layer.name: layer for prefix, plan in self._plans.items() for layer in plan.layers if layer.spec is not None
        }

    @property
    def skipped(self) -> dict[str, str]:
        """The attention modules that keep their original attention, and why."""
        return {prefix + name: reason for prefix, plan in self._plans.items() for name, reason in plan.skipped.items()}

    @property
    def k_shift(self) -> dict[str, torch.Tensor]:
        """The shifts in force: of each patched module that has one, by name, float32 [key heads, head_dim].

        They outlive the patch: `patch_model(model, handle.config, k_shift=handle.k_shift)` brings all of it back.
        """
        return {name: layer.k_shift for name, layer in self.patched.items() if layer.k_shift is not None}

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, every module runs its original attention. May be nested.

        With gradient checkpointing run the backward pass inside too, for it computes the forward pass again.
        """
        before = self._enabled()
        try:
            self._switch(dict.fromkeys(before, False))
            yield
        finally:
            self._switch(before)

    @contextlib.contextmanager
    def observed(self, observer: Callable[[AttentionLayer, AttentionCall], None]) -> Iterator[None]:
        """Inside, every patched module runs its original attention, eagerly, and shows each call to `observer`."""
        layers = list(self.patched.values())
        try:
            for layer in layers:
                layer.observer = observer
            self._switch(self._enabled())
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            for layer in layers:
                layer.observer = None
            self._switch(self._enabled())

    @contextlib.contextmanager
    def original_steps(self, *, first: int = 0, last: int = 0) -> Iterator[Callable[..., dict[str, Any]]]:
        """Inside, the first and last denoising steps of a diffusers pipeline run original attention:

            with handle.original_steps(first=2, last=1) as callback:
                video = pipe(prompt, callback_on_step_end=callback)

        Args:
            first, last: how many steps. A step is an entry of the scheduler's timesteps (a scheduler of second order has
                nearly two for each inference step).

        Yields:
            The callback that the pipeline has to call after each step. It may be used for several calls in a row.

        Raises:
            ValueError: a number is negative, no step is left for 4-bit attention, or the callback was not used.
        """
        if not all(isinstance(n, int) and n >= 0 for n in (first, last)):
            raise ValueError(f"original_steps: expected numbers of steps from 0 up, got first={first!r}, last={last!r}")
        before = self._enabled()
        original = dict.fromkeys(before, False)
        called = False

        def callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            nonlocal called
            called = True
            steps = pipeline.num_timesteps
            if first + last >= steps:
                raise ValueError(
                    f"original_steps: expected fewer than the {steps} steps of this call, got first={first} and last={last}; "
                    "use handle.disabled() to run all of them in original attention"
                )
            upcoming = (step + 1) % steps
            self._switch(before if first <= upcoming < steps - last else original)
            return tensors

        try:
            self._switch(original if first else before)
            yield callback
        finally:
            self._switch(before)
        if not called:
            raise ValueError("original_steps: the callback was not called; pass it to the pipeline as callback_on_step_end")

    def cache(self) -> Any:
        """An empty cache for a language model that keeps the keys and values of patched modules in NVFP4, 4.5 bits a value:

            model.generate(**inputs, past_key_values=handle.cache())

        It generates what the same model does without a cache. A transformers `Cache`: batches with left padding, beam search and
        assisted generation work. (From transformers 5.24 on, `generate` prefers the name `cache` for the argument.)

        Raises:
            ValueError: the models are not language models, or leave V unquantized (`pv="bf16"`).
        """
        plan = next(iter(self._plans.values()))
        return _ADAPTERS[plan.host].new_cache(plan.model, plan.layers)

    def _enabled(self) -> dict[AttentionLayer, bool]:
        return {layer: layer.enabled for plan in self._plans.values() for layer in plan.layers}

    def _switch(self, enabled: dict[AttentionLayer, bool]) -> None:
        for plan in self._plans.values():
            for layer in plan.layers:
                layer.enabled = enabled[layer]
            if plan.in_force:
                _ADAPTERS[plan.host].switch(plan.model, plan.layers)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _restore(self._plans.values())

    def __str__(self) -> str:
        patched, skipped = self.patched, self.skipped
        models = ", ".join(type(model).__name__ for model in self.models)
        lines = [f"{models}: 4-bit attention in {len(patched)} of {len(patched) + len(skipped)} attention modules"]
        for prefix, plan in self._plans.items():
            lines += [
                f"  patched  {prefix}{layer.name}: {plan.describe(layer)}" for layer in plan.layers if layer.spec is not None
            ]
        lines += [f"  skipped  {name}: {reason}" for name, reason in skipped.items()]
        return "\n".join(lines)


def patch_model(
    model: Any, config: AttnQATConfig | None = None, *, k_shift: Mapping[str, torch.Tensor] | None = None
) -> PatchHandle:
    """Switch a model to 4-bit attention, in place. Parameters and state_dict keys stay as they are.

    Args:
        model: a Transformers causal language model, a Diffusers transformer, a module around one (such as a PEFT model),
            or a Diffusers pipeline, of which `transformer` and `transformer_2` are patched and nothing else. The names of
            modules start in each model, without `transformer.`.
        config: which modules, and what is quantized. Default: what an export of this package stored in the model's
            config, else `AttnQATConfig()`, every attention module in NVFP4.
        k_shift: vectors that are subtracted from keys before these are quantized, float32 [key heads, head_dim], by the names
            of patched modules (docs/NUMERICS.md, section 6). `calibrate` measures them; `handle.k_shift` has them.

    Returns:
        The handle; the model keeps it too (see `get_handle`).

    Raises:
        ValueError: the model is patched already, has no attention that can be patched, or needs something that 4-bit
            attention cannot do. Nothing has been changed then.
    """
    taken = {name: _handle(root) is not None for name, root in _roots(model).items()}
    if any(taken.values()):
        which = " and ".join(name for name, patched in taken.items() if patched) or "this model"
        raise ValueError(f"patch_model: {which} is patched already; call unpatch_model first to patch it differently")
    plans = {prefix: _plan(host, part, config) for prefix, host, part in _parts(model)}
    skipped = [f"{name}: {reason}" for plan in plans.values() for name, reason in plan.skipped.items()]
    if not any(layer.spec is not None for plan in plans.values() for layer in plan.layers):
        reasons = "; ".join(skipped[:3]) + ("; ..." if len(skipped) > 3 else "")
        raise ValueError(f"patch_model: nothing to patch in {type(model).__name__} ({reasons})")
    _set_shifts(plans, k_shift or {})
    try:
        for plan in plans.values():
            setattr(plan.model, _HANDLE, PatchHandle({"": plan}))
            _ADAPTERS[plan.host].apply(plan.model, plan.layers)
    except BaseException:
        _restore(plans.values())
        raise
    return get_handle(model)


def unpatch_model(model: Any) -> None:
    """Give a model its original attention back. Its outputs are then bit-equal to those before the patch.

    Raises:
        ValueError: the model is not patched.
    """
    handle = get_handle(model)
    if handle is None:
        raise ValueError("unpatch_model: this model is not patched; patch_model patches it")
    _restore(handle._plans.values())


def get_handle(model: Any) -> PatchHandle | None:
    """The handle of a patched model (also through a wrapper such as DDP or PEFT), or None.

    Of a pipeline: one handle for those of its transformers that are patched; each of them has a handle of its own too.
    """
    handles = {name: handle for name, root in _roots(model).items() if (handle := _handle(root)) is not None}
    if not handles or "" in handles:
        return handles.get("")
    return PatchHandle({f"{name}.": handle._plans[""] for name, handle in handles.items()})


def _handle(root: torch.nn.Module) -> PatchHandle | None:
    return next((handle for module in root.modules() if (handle := module.__dict__.get(_HANDLE)) is not None), None)


@dataclasses.dataclass(eq=False)
class _Plan:
    """What to do to one model, and after `apply` what was done. Plain data, so that a patched model can be copied."""

    host: str
    model: torch.nn.Module
    config: AttnQATConfig
    layers: list[AttentionLayer]
    skipped: dict[str, str]

    @property
    def in_force(self) -> bool:
        handle = self.model.__dict__.get(_HANDLE)
        return handle is not None and self in handle._plans.values()

    def describe(self, layer: AttentionLayer) -> str:
        """What the receipt says about a patched module."""
        options = [name for name in ("rotate", "four_over_six") if getattr(layer.spec, name)]
        options += ["k_shift"] if layer.k_shift is not None else []
        found = _ADAPTERS[self.host].replaced(self.model, layer) if self.in_force else None
        lost = f" - LOST: {found} was put in its place after the patch" if found else ""
        return ", ".join([f"QK nvfp4, PV {layer.spec.pv}", *options]) + lost


def _plan(host: str, model: torch.nn.Module, config: AttnQATConfig | None) -> _Plan:
    adapter = _ADAPTERS[host]
    config = config or adapter.stored_config(model) or AttnQATConfig()
    names = adapter.attention_modules(model)
    if not names:
        raise ValueError(
            f"patch_model: found no attention in {type(model).__name__} that goes through {adapter.MECHANISM}; "
            "only such attention can be patched"
        )
    config.check_patterns(names)
    skipped = {name: reason for name, module in names.items() if (reason := adapter.reason_to_skip(module)) is not None}
    skipped |= config.reasons_to_skip(name for name in names if name not in skipped)
    layers, refused = [], {}
    for name, module in names.items():
        spec = None if name in skipped else config.spec_of(name)
        if spec is not None and (problem := adapter.problem(module, spec)) is not None:
            refused[name] = problem
        layers.append(AttentionLayer(name=name, spec=spec, original=adapter.original(model, module)))
    if refused:
        raise ValueError(_refusal(model, config, refused))
    config.check_overrides(layer.name for layer in layers if layer.spec is not None)
    return _Plan(
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


def _set_shifts(plans: dict[str, _Plan], shifts: Mapping[str, torch.Tensor]) -> None:
    layers = {prefix + layer.name: layer for prefix, plan in plans.items() for layer in plan.layers if layer.spec is not None}
    for name, shift in shifts.items():
        if name not in layers:
            raise ValueError(
                f"patch_model: k_shift: expected names of modules that are patched, such as {next(iter(layers))}, got {name!r}"
            )
        if not isinstance(shift, torch.Tensor) or shift.dtype != torch.float32 or shift.ndim != 2:
            got = f"{shift.dtype} {list(shift.shape)}" if isinstance(shift, torch.Tensor) else repr(shift)
            raise ValueError(f"patch_model: k_shift[{name!r}]: expected float32 [key heads, head_dim], got {got}")
        layers[name].k_shift = shift.detach()


def _restore(plans: Iterable[_Plan]) -> None:
    for plan in plans:
        if plan.in_force:
            _ADAPTERS[plan.host].restore(plan.model, plan.layers)
            delattr(plan.model, _HANDLE)


def _roots(model: Any) -> dict[str, torch.nn.Module]:
    """Where to look for models: the transformers of a pipeline by component name, or a module under the empty name."""
    return {"": model} if isinstance(model, torch.nn.Module) else diffusers_adapter.pipeline_models(model)


def _parts(model: Any) -> list[tuple[str, str, torch.nn.Module]]:
    """The models to patch as (prefix of their module names, host, model)."""
    parts = []
    for name, root in _roots(model).items():
        for module in root.modules():
            host = next((host for host, adapter in _ADAPTERS.items() if adapter.owns(module)), None)
            if host is not None:
                parts.append((f"{name}." if name else "", host, module))
                break
    if not parts:
        raise ValueError(
            f"patch_model: expected a model of {' or '.join(_ADAPTERS)}, or a diffusers pipeline with a transformer, "
            f"got {type(model).__module__}.{type(model).__name__}"
        )
    return parts
