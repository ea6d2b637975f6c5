"""The handle of a patched model: the receipt, and ways to switch 4-bit attention off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qat_kernels import QuantSpec

from .config import AttnQATConfig
from .layer import AttentionCall, AttentionLayer
from .plan import Plan, restore


class PatchHandle:
    """A patch in force: what it did, a way to switch it off for a while, and the way back.

    `print(handle)` is the receipt. As a context manager it unpatches on exit.
    """

    def __init__(self, plans: dict[str, Plan]) -> None:
        self.plans = plans
        """By the prefix of their module names: what tells the models of a pipeline apart."""

    @property
    def config(self) -> AttnQATConfig:
        """The config that was applied; where the models of a pipeline were patched one by one, the first one's."""
        return next(iter(self.plans.values())).config

    @property
    def host(self) -> str:
        """The library of the patched models: `transformers` or `diffusers`."""
        return next(iter(self.plans.values())).host

    @property
    def models(self) -> list[torch.nn.Module]:
        """The models of the host library that are patched; one, or the parts of a pipeline."""
        return [plan.model for plan in self.plans.values()]

    @property
    def patched(self) -> dict[str, AttentionLayer]:
        """The modules that run 4-bit attention, by name."""
        return {prefix + layer.name: layer for prefix, plan in self.plans.items() for layer in plan.patched}

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """What each patched module quantizes, by name."""
        return {name: layer.spec for name, layer in self.patched.items()}

    @property
    def skipped(self) -> dict[str, str]:
        """The attention modules that keep their original attention, and why."""
        return {prefix + name: reason for prefix, plan in self.plans.items() for name, reason in plan.skipped.items()}

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
        assisted generation, with at most 32 tokens guessed at a time, work. (From transformers 5.24 on, `generate` prefers the
        name `cache` for the argument.)

        Raises:
            ValueError: the models are not language models, or leave V unquantized (`pv="bf16"`).
        """
        plan = next(iter(self.plans.values()))
        return plan.adapter.new_cache(plan.model, plan.layers)

    def _enabled(self) -> dict[AttentionLayer, bool]:
        return {layer: layer.enabled for plan in self.plans.values() for layer in plan.layers}

    def _switch(self, enabled: dict[AttentionLayer, bool]) -> None:
        for plan in self.plans.values():
            for layer in plan.layers:
                layer.enabled = enabled[layer]
            if plan.in_force:
                plan.adapter.switch(plan.model, plan.layers)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        restore(self.plans.values())

    def __str__(self) -> str:
        patched, skipped = self.patched, self.skipped
        models = ", ".join(type(model).__name__ for model in self.models)
        lines = [f"{models}: 4-bit attention in {len(patched)} of {len(patched) + len(skipped)} attention modules"]
        for prefix, plan in self.plans.items():
            lines += [f"  patched  {prefix}{layer.name}: {plan.describe(layer)}" for layer in plan.patched]
        lines += [f"  skipped  {name}: {reason}" for name, reason in skipped.items()]
        return "\n".join(lines)
