"""Check in its first call that a patched module reaches 4-bit attention; if it does not, raise an error with the reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .hosts import ADAPTERS
from .layer import AttentionLayer

_KEY = -1
"""The id of our hook, the same in all modules: a compiled graph checks the id, and blocks share one graph. PyTorch's own ids
count up from 0, so this one cannot collide with them, even after a pickled model is loaded."""


@dataclasses.dataclass(eq=False)
class FirstCall:
    """A hook around `forward` that removes itself after the module has reached 4-bit attention, so later calls cost nothing.

    Under torch.compile the check runs during tracing and leaves nothing in the graph. It is plain data, so that a patched model
    can be copied and pickled, and it refers to no model, so that copying a module copies nothing else.
    """

    host: str
    layer: AttentionLayer
    traced_before: int = 0
    """How many calls of 4-bit attention the graph held when the trace entered the module."""

    def __call__(self, module: torch.nn.Module, args: Any, *output: Any) -> None:
        """Handle the start of a call, or its end with an output (None: with an exception).

        Raises:
            ValueError: the call should have run 4-bit attention and did not, and no hook of the host library skipped it.
        """
        if torch.compiler.is_compiling():
            from torch._dynamo.comptime import comptime

            comptime(_after_trace if output else _before_trace)
        elif not output:
            self.layer.probed, self.layer.skipped_by = True, None
        else:
            self.layer.probed = False
            if self.layer.reached and not self.layer.traced:  # removing the hook would make torch.compile compile again
                _remove(module)
            elif not self.layer.reached and output[0] is not None:
                self.check(module)

    def check(self, module: torch.nn.Module) -> None:
        """Raise a ValueError, or note the hook that skipped attention."""
        layer, adapter = self.layer, ADAPTERS[self.host]
        if not layer.quantizes or layer.observer is not None:
            return  # a later call decides
        found = adapter.replaced(module, layer)
        skipping = layer.skipped_by or adapter.skipping_hook(module)
        if found is None and skipping is not None:
            layer.skipped_by = skipping
            return
        reason = f"{found} was put in its place after the patch" if found else adapter.why_not_reached(module)
        raise ValueError(
            f"4-bit attention ({layer.name}): expected a call of this module to reach it, and this one did not: {reason}; "
            + ("call unpatch_model, set what you need, and patch again" if found else "exclude this module from the patch")
        )


@dataclasses.dataclass(eq=False)
class CheckedAgain:
    """Replaces a host method that may replace attention: it runs the method, then has the next calls checked again."""

    host: str
    owner: torch.nn.Module
    method: str
    layers: dict[str, AttentionLayer]
    """By module name in `owner`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = getattr(type(self.owner), self.method)(self.owner, *args, **kwargs)
        for name, layer in self.layers.items():
            _watch(self.host, self.owner.get_submodule(name), layer)
        return result


def watch(host: str, model: torch.nn.Module, layers: list[AttentionLayer]) -> None:
    """Check the next call of each patched module, now and after each call of a host method that replaces attention."""
    method = ADAPTERS[host].REPLACED_BY
    for layer in layers:
        _watch(host, model.get_submodule(layer.name), layer)
    for name, owner in model.named_modules():
        prefix = f"{name}." if name else ""
        inside = {layer.name[len(prefix) :]: layer for layer in layers if f"{layer.name}.".startswith(prefix)}
        if inside and callable(getattr(type(owner), method, None)) and method not in vars(owner):
            setattr(owner, method, CheckedAgain(host, owner, method, inside))


def unwatch(model: torch.nn.Module) -> None:
    """Undo `watch`."""
    for module in model.modules():
        _remove(module)
        for name, value in list(vars(module).items()):
            if isinstance(value, CheckedAgain):
                delattr(module, name)


def _watch(host: str, module: torch.nn.Module, layer: AttentionLayer) -> None:
    layer.reached, layer.traced, layer.skipped_by = False, False, None
    _remove(module)
    module._forward_pre_hooks[_KEY] = module._forward_hooks[_KEY] = FirstCall(host, layer)
    module._forward_hooks_always_called[_KEY] = True


def _remove(module: torch.nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._forward_hooks_always_called):
        hooks.pop(_KEY, None)


def _before_trace(context: Any) -> None:
    _traced(context, "self").traced_before = _calls_in_graph(context)


def _after_trace(context: Any) -> None:
    hook: FirstCall = _traced(context, "self")
    if _calls_in_graph(context) > hook.traced_before:
        hook.layer.traced, hook.layer.skipped_by = True, None
    elif not hook.layer.traced:
        hook.check(_traced(context, "module"))


def _calls_in_graph(context: Any) -> int:
    return sum(str(node.target).startswith("qat_kernels.") for node in context.graph().nodes if node.op == "call_function")


def _traced(context: Any, name: str) -> Any:
    """The object in a local variable of the traced function; `context` comes from `comptime`."""
    return context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker().realize().value
