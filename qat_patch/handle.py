"""The handle of a patched model: the receipt, and ways to switch 4-bit attention off temporarily."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qat_kernels import QuantSpec
from qat_kernels.arguments import Impl
from qat_kernels.verdicts import Case

from .config import AttnQATConfig
from .implementation import describe_impl, devices_of
from .layer import SHIFTS, AttentionCall, AttentionLayer, Shifts
from .plan import Plan, restore
from .self_check.check import Checked, CheckReport, check, known_verdicts, unchecked

_SWITCHING = threading.RLock()
_LISTED = 8
"""A receipt lists up to this many skipped modules with the same reason one by one."""
"""Held while layers are switched, because several threads may switch one model. It belongs to no model."""


class PatchHandle:
    """An active patch: what it did, and how to switch it off or undo it.

    `print(handle)` is the receipt. As a context manager it unpatches on exit.
    """

    def __init__(self, plans: dict[str, Plan], untouched: dict[str, str] | None = None) -> None:
        self.plans = plans
        """By the prefix of the module names, which tells the models of a pipeline apart."""
        self.untouched = untouched or {}
        """The classes of other models in the pipeline that could be patched but are not, by component name."""

    @property
    def config(self) -> AttnQATConfig:
        """The applied config; if the models of a pipeline were patched one by one, that of the first."""
        return next(iter(self.plans.values())).config

    @property
    def host(self) -> str:
        """The library of the patched models: `transformers` or `diffusers`."""
        return next(iter(self.plans.values())).host

    @property
    def models(self) -> list[torch.nn.Module]:
        """The patched models of the host library: one, or the parts of a pipeline."""
        return [plan.model for plan in self.plans.values()]

    @property
    def patched(self) -> dict[str, AttentionLayer]:
        """The modules that run 4-bit attention, by name."""
        return {prefix + layer.name: layer for prefix, plan in self.plans.items() for layer in plan.patched}

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """The QuantSpec of each patched module, by name."""
        return {name: layer.spec for name, layer in self.patched.items()}

    @property
    def skipped(self) -> dict[str, str]:
        """The attention modules that keep their original attention, and why."""
        return {prefix + name: reason for prefix, plan in self.plans.items() for name, reason in plan.skipped.items()}

    @property
    def k_shift(self) -> dict[str, torch.Tensor]:
        """The active K shifts by module name, float32 [key heads, head_dim], for each patched module that has one."""
        return self.shifts["k_shift"]

    @property
    def q_shift(self) -> dict[str, torch.Tensor]:
        """The same for Q shifts."""
        return self.shifts["q_shift"]

    @property
    def shifts(self) -> Shifts:
        """`k_shift` and `q_shift` by these names.

        You can use them after unpatching: `patch_model(model, handle.config, **handle.shifts)` restores the patch.
        """
        patched = self.patched
        return {
            which: {name: layer.shifts[which] for name, layer in patched.items() if which in layer.shifts} for which in SHIFTS
        }

    @property
    def impl(self) -> Impl:
        """The implementation that `patch_model` was asked for; the receipt says what really runs."""
        return next(iter(self.plans.values())).impl

    def unchecked(self, device: torch.device) -> list[Case]:
        """The kinds of calls of these models that could run on a device's FP4 units, but are not checked there yet."""
        verdicts = known_verdicts()
        return [case for plan in self.plans.values() if plan.impl == "auto" for case in unchecked(verdicts, device, plan.cases())]

    def check(self, device: torch.device | None = None) -> CheckReport:
        """Check FP4 units on this machine, for each kind of call of these models.

        This runs for minutes, in child processes, with random tensors. After it `impl="auto"` takes `fp4` (for the preset `sage3`
        `sageattn3`, SageAttention3 itself, if installed) for calls where it is right and faster: in these models at once, in
        others from their next `patch_model`.

        Args:
            device: default: the models' GPU, or every GPU.

        Returns:
            The results; `print` shows a table.

        Raises:
            ValueError: there is no NVIDIA GPU that could run the kernels.
        """
        checked: list[Checked] = []
        seen: set[tuple[Any, ...]] = set()  # two transformers of a pipeline make the same calls
        for plan in self.plans.values():
            devices, cases = devices_of(plan) if device is None else [device], plan.cases()
            if cases and seen.issuperset((*devices, case) for case in cases):
                continue
            seen.update((*devices, case) for case in cases)
            checked += check(devices, cases).checked
        verdicts = known_verdicts()
        for plan in self.plans.values():
            plan.take(plan.impl, verdicts)
        return CheckReport(tuple(checked))

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the original attention in every module while the context is open.

        This affects the whole model: other threads and tasks that call it meanwhile get original attention too. Several contexts
        may be open at once and end in any order; 4-bit attention is back when all have ended. With gradient checkpointing run the
        backward pass inside too, because it computes the forward pass again.
        """
        self._hold(1)
        try:
            yield
        finally:
            self._hold(-1)

    @contextlib.contextmanager
    def observed(self, observer: Callable[[AttentionLayer, AttentionCall], None]) -> Iterator[None]:
        """Inside, every patched module runs its original attention, eagerly, and passes each call to `observer`.

        Raises:
            ValueError: the model is observed already; a second observer would take the calls of the first.
        """
        layers = list(self.patched.values())
        with _SWITCHING:
            if taken := [layer.name for layer in layers if layer.observer is not None]:
                raise ValueError(
                    f"observed: expected a model that is not observed yet, got one that is ({taken[0]}), by a "
                    "calibration or a measurement; wait until it has ended"
                )
            for layer in layers:
                layer.observer = observer
            self._switch()
        try:
            with torch.compiler.set_stance("force_eager"):
                yield
        finally:
            with _SWITCHING:
                for layer in layers:
                    layer.observer = None
                self._switch()

    @contextlib.contextmanager
    def original_steps(self, *, first: int = 0, last: int = 0) -> Iterator[Callable[..., dict[str, Any]]]:
        """Run the first and last denoising steps of a diffusers pipeline in original attention:

            with handle.original_steps(first=2, last=1) as callback:
                video = pipe(prompt, callback_on_step_end=callback)

        Args:
            first, last: the number of steps. A step is an entry of the scheduler's timesteps (a second-order scheduler has nearly
                two for each inference step).

        Yields:
            The callback for the pipeline to call after each step. You can use it for several calls in a row.

        Raises:
            ValueError: a number is negative, no step is left for 4-bit attention, or the callback was not used.
        """
        if not all(isinstance(n, int) and n >= 0 for n in (first, last)):
            raise ValueError(f"original_steps: expected numbers of steps from 0 up, got first={first!r}, last={last!r}")
        called = held = False

        def hold(original: bool) -> None:
            nonlocal held
            if original != held:
                self._hold(1 if original else -1)
                held = original

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
            hold(not first <= upcoming < steps - last)
            return tensors

        try:
            hold(first > 0)
            yield callback
        finally:
            hold(False)
        if not called:
            raise ValueError("original_steps: the callback was not called; pass it to the pipeline as callback_on_step_end")

    def cache(self) -> Any:
        """An empty cache for a language model. It keeps keys and values of patched modules in NVFP4, 4.5 bits per value:

            model.generate(**inputs, cache=handle.cache())  # before transformers 5.24: past_key_values=handle.cache()

        The model generates the same as without a cache. With `QuantSpec(preset="kv_nvfp4")` the cache holds what the NVFP4 caches
        of servers hold, so the model will generate the same there. It is a transformers `Cache`, or an `EncoderDecoderCache` for
        an encoder-decoder. Batches with left padding, beam search and assisted generation work; except with `kv_nvfp4`, assisted
        generation may guess at most 32 tokens at a time. Modules that cannot use it keep transformers' own cache: those with a
        preset that has no such cache, with a recurrent state beside attention, or whose code uses what a cache
        returned.

        Raises:
            ValueError: the models are not language models, lost 4-bit attention, or no module can use it; the message says why.
        """
        self.check_in_force("cache", may_be_disabled=True)
        plan = next(iter(self.plans.values()))
        return plan.adapter.new_cache(plan.model, plan.layers)

    @contextlib.contextmanager
    def cached(self) -> Iterator[None]:
        """Inside, every call of the model's `generate` keeps keys and values in NVFP4, as with `cache()`:

            with handle.cached():
                trainer.train()  # GRPOTrainer of TRL, whose calls of generate pass no cache

        A call that passes its own cache, or `use_cache=False`, gets that; one inside `disabled()` gets the default cache.

        Raises:
            ValueError: as for `cache`, or the model is inside `cached()` already, or cannot generate.
        """
        self.check_in_force("cached", may_be_disabled=True)
        plan = next(iter(self.plans.values()))
        with plan.adapter.generating(plan.model, plan.layers):
            yield

    def check_in_force(self, action: str, *, may_be_disabled: bool = False) -> None:
        """Check that the models are really patched now, before an action that needs this.

        Args:
            action: the name of the action, for the message.
            may_be_disabled: the action does not need 4-bit attention to be switched on now.

        Raises:
            ValueError: a module does not run 4-bit attention: it was unpatched, replaced, or is inside `disabled()`.
        """
        for prefix, plan in self.plans.items():
            if not plan.in_force:
                raise ValueError(
                    f"{action}: expected a patched model, got a {type(plan.model).__name__} that is no longer patched, or was "
                    "patched again; call patch_model, or take get_handle(model)"
                )
            for layer in plan.patched:
                if found := plan.replaced(layer):
                    raise ValueError(
                        f"{action}: {prefix}{layer.name}: expected 4-bit attention, got {found}, which was put in its place "
                        "after the patch; call unpatch_model and patch_model again"
                    )
                if layer.off and not may_be_disabled:
                    raise ValueError(
                        f"{action}: {prefix}{layer.name}: expected 4-bit attention, got original attention inside "
                        "handle.disabled() or original_steps(); do it outside"
                    )

    def _hold(self, by: int) -> None:
        """Count the open contexts that need original attention."""
        with _SWITCHING:
            for plan in self.plans.values():
                for layer in plan.layers:
                    layer.off += by
            self._switch()

    def _switch(self) -> None:
        for plan in self.plans.values():
            if plan.in_force:
                plan.adapter.switch(plan.model, plan.layers)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        restore(self.plans.values())

    def __str__(self) -> str:
        patched, skipped = self.patched, self.skipped
        models = ", ".join(type(model).__name__ for model in self.models)
        impls = "; ".join(dict.fromkeys(map(describe_impl, self.plans.values())))
        lines = [f"{models}: 4-bit attention in {len(patched)} of {len(patched) + len(skipped)} attention modules; {impls}"]
        if not all(plan.in_force for plan in self.plans.values()):
            lines.insert(0, "no longer patched, or patched again: this is the receipt of an earlier patch")
        for prefix, plan in self.plans.items():
            lines += [f"  patched  {prefix}{layer.name}: {plan.describe(layer)}" for layer in plan.patched]
        # Encoders have many skipped modules, all for one reason.
        by_reason: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in by_reason.items():
            shown = names if len(names) <= _LISTED else [f"{names[0]} and {len(names) - 1} more, up to {names[-1]}"]
            lines += [f"  skipped  {name}: {reason}" for name in shown]
        lines += [f"  not patched  {name}: patch_model(pipe.{name}) patches this {kind}" for name, kind in self.untouched.items()]
        return "\n".join(lines)
