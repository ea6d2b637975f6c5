"""Registers our quantizer and records in the host libraries without importing them: at once, or when they are imported."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .record import record_in_diffusers, record_in_peft, record_in_transformers


def register_when_imported() -> None:
    """Register in each module of a host library as soon as it is imported."""
    missing = {}
    for name, enter in _ENTRIES.items():
        if name in sys.modules:
            enter(sys.modules[name])
        else:
            missing[name] = enter
    if missing and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(missing))


def _register_quantizer(registry: ModuleType) -> None:
    from . import quantizer  # noqa: F401  (it registers itself)


_ENTRIES: dict[str, Callable[[Any], None]] = {
    "transformers.quantizers.auto": _register_quantizer,
    "transformers.modeling_utils": record_in_transformers,
    "diffusers.models.modeling_utils": record_in_diffusers,
    "peft.peft_model": record_in_peft,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds no module itself: it makes the import of one of these modules call `enter` too."""

    def __init__(self, entries: dict[str, Callable[[Any], None]]) -> None:
        self.entries = entries

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        enter = self.entries.pop(name, None)
        if enter is None:
            return None
        if not self.entries:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                enter(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
