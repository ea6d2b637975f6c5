"""patch_model: plan, check, apply, receipt. Knows how to patch; the adapters know the host libraries."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from qat_kernels import QuantSpec

from . import diffusers_adapter, transformers_adapter
from .config import AttnQATConfig

_ADAPTERS = {"transformers": transformers_adapter, "diffusers": diffusers_adapter}
_HANDLE = "_qat_handle"


@dataclasses.dataclass(eq=False)
class AttentionLayer:
    """What an attention module of a patched model looks up at every call. The handle owns it."""

    name: str
    """The module's name in its model."""
    spec: QuantSpec | None
    """What is quantized; None if the module keeps its original attention."""
    original: Any
    """What ran here before, as the adapter restores it: an implementation's name, or a processor object."""
    enabled: bool = True
    """False inside `handle.disabled()`."""

    @property
    def quantizes(self) -> bool:
        return self.enabled and self.spec is not None


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
        for name, layer in patched.items():
            lines.append(f"  patched  {name}: {_describe(layer.spec)}")
        lines += [f"  skipped  {name}: {reason}" for name, reason in skipped.items()]
        return "\n".join(lines)


def patch_model(model: Any, config: AttnQATConfig | None = None) -> PatchHandle:
    """Switch a model to 4-bit attention, in place. Parameters and state_dict keys stay as they are.

    Args:
        model: a Transformers causal language model, a Diffusers transformer, a module around one (such as a PEFT model),
            or a Diffusers pipeline, of which `transformer` and `transformer_2` are patched and nothing else. The names of
            modules start in each model, without `transformer.`.
        config: which modules, and what is quantized. Default: what an export of this package stored in the model's
            config, else `AttnQATConfig()`, every attention module in NVFP4.

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
    layers, skipped = [], {}
    for name, module in names.items():
        reason = config.reason_to_skip(name) or adapter.reason_to_skip(module)
        if reason is None:
            adapter.check(name, module, config.spec)
        else:
            skipped[name] = reason
        layers.append(
            AttentionLayer(name=name, spec=config.spec if reason is None else None, original=adapter.original(model, module))
        )
    return _Plan(host=host, model=model, config=config, layers=layers, skipped=skipped)


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


def _describe(spec: QuantSpec) -> str:
    options = [name for name in ("rotate", "four_over_six") if getattr(spec, name)]
    return ", ".join([f"QK nvfp4, PV {spec.pv}", *options])
