"""Reads a processor's code before it runs: whether it calls the dispatcher, and with which backend."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

import torch

DISPATCH = "dispatch_attention_fn"
BACKEND = "_attention_backend"
_HOME = "diffusers.models.attention_dispatch"


def reason_to_skip(kind: Any, mechanism: str) -> str | None:
    """Why processors of this class cannot run 4-bit attention, or None."""
    name, code = kind.__name__, _Code(kind)
    if not code.dispatching:
        return f"its {name} does not go through {mechanism}"
    if getattr(kind, BACKEND, None) is not None and not isinstance(getattr(kind, BACKEND), property):
        return f"its {name} is made for the backend {str(getattr(kind, BACKEND))!r}"
    for function in code.dispatching:
        if (backend := _named_backend(function)) is not None:
            return f"its {name} names a backend of its own: {backend}"
    if not hasattr(kind, BACKEND):
        return f"its {name} passes no backend on to {mechanism}"
    for function in code.helpers:
        if BACKEND in _names(function) or BACKEND in _strings(function):
            return f"its {name} asks which backend is set, in {function.__name__}"
    return None


def dispatchers(kind: Any) -> list[tuple[dict[str, Any], str]]:
    """Where the code of these processors finds the dispatcher: namespaces and the name in each."""
    places = []
    for function in _Code(kind).all:
        namespace = function.__globals__
        for name in _names(function):
            if name in namespace and (name == DISPATCH or is_dispatcher(namespace[name])):
                places.append((namespace, name))
    if not places:  # it is imported inside a function, or called as an attribute of its module
        from diffusers.models import attention_dispatch

        places.append((vars(attention_dispatch), DISPATCH))
    return places


def is_dispatcher(value: Any) -> bool:
    """Whether this is the dispatcher of diffusers, wrapped or not."""
    return getattr(value, "__name__", None) == DISPATCH and getattr(value, "__module__", None) == _HOME


class _Code:
    """The functions that a processor runs: its methods, and the functions of their files that they call by name."""

    def __init__(self, kind: Any) -> None:
        self.all = list(dict.fromkeys(_methods(kind)))
        methods = set(self.all)
        for function in self.all:  # the list grows during the loop
            for name in _names(function):
                value = function.__globals__.get(name)
                if isinstance(value, FunctionType) and not is_dispatcher(value):
                    value = inspect.unwrap(value)
                    if value.__globals__ is function.__globals__ and value not in self.all:
                        self.all.append(value)
        self.helpers = [function for function in self.all if function not in methods]
        self.dispatching = [function for function in self.all if _dispatches(function)]


def _methods(kind: Any) -> Iterator[FunctionType]:
    """The methods of a class, and those of its bases that are used: not overridden, or called through `super` or the base."""
    bases = [base for base in kind.__mro__ if base not in (object, torch.nn.Module)]
    names = {base.__name__ for base in bases} | {"super"}
    for name in dict.fromkeys(name for base in bases for name in vars(base)):
        for base in bases:
            method = inspect.unwrap(vars(base).get(name, object))
            if isinstance(method, FunctionType):
                yield method
                if not names & set(_names(method)):
                    break


def _dispatches(function: FunctionType) -> bool:
    names = _names(function)
    return DISPATCH in names or any(is_dispatcher(function.__globals__.get(name)) for name in names)


def _named_backend(function: FunctionType) -> str | None:
    from diffusers.models.attention_dispatch import AttentionBackendName

    if AttentionBackendName.__name__ in _names(function):
        members = [member for member in AttentionBackendName if member.name in _names(function)]
        return repr(members[0].value) if len(members) == 1 else AttentionBackendName.__name__
    values = {member.value for member in AttentionBackendName}
    return next((repr(text) for text in _strings(function) if text in values), None)


@functools.cache
def _codes(code: CodeType) -> tuple[CodeType, ...]:
    """The code of a function, and of those inside it."""
    inner = [inside for constant in code.co_consts if isinstance(constant, CodeType) for inside in _codes(constant)]
    return (code, *inner)


def _names(function: FunctionType) -> tuple[str, ...]:
    return tuple(name for code in _codes(function.__code__) for name in code.co_names)


def _strings(function: FunctionType) -> tuple[str, ...]:
    return tuple(text for code in _codes(function.__code__) for text in code.co_consts if isinstance(text, str))
