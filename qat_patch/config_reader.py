"""Strict reading of frozen dataclasses from plain values: used for every config and settings file of this project."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


def from_dict(
    cls: type[T], values: Any, where: str, *, parse: Callable[[Any, Any], Any] | None = None, checks_itself: bool = False
) -> T:
    """A dataclass from plain dicts, lists and scalars; missing keys take their defaults.

    Args:
        cls: a dataclass. Its annotations say what each value must be: scalars, Literals of texts, tuples, dicts with text keys,
            other dataclasses, and each of these or None.
        values: a mapping by field name.
        where: what messages call this mapping, such as `settings`.
        parse: called first with each value and its annotation; returns the value to check. For values that are still text.
        checks_itself: the dataclasses check their fields themselves, with better messages. A value of a wrong type is passed
            on to them.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing key, or a value of the wrong type or out of range.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    check_keys(where, values, [field.name for field in fields])
    for field in fields:
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"{where}: {field.name!r} is missing; set it in the file or as an argument")
    reader = _Reader(parse, checks_itself)
    hints = typing.get_type_hints(cls)
    read = {key: reader.convert(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**read)
    except ValueError as error:
        # A dataclass that has several places in a config names its field alone: `path: there is no file`.
        if str(error).partition(":")[0] in hints:
            raise ValueError(f"{where}.{error}") from error
        raise


def check_keys(what: str, values: Any, known: Sequence[str]) -> None:
    """Raise a ValueError if `values` is not a dict or has a key that is not `known`; it names the nearest known key."""
    if not isinstance(values, dict):
        raise ValueError(f"{what}: expected a mapping with the keys {', '.join(known)}, got {values!r}")
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{what}: unknown key {key!r}; expected one of {', '.join(known)}{hint}")


def spell(hint: Any) -> str:
    """An annotation in words, for messages and --help."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(args)
    if origin is tuple:
        return ", ".join("..." if arg is ... else spell(arg) for arg in args)
    if origin is dict:
        return f"a mapping to {spell(args[1])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is types.NoneType else spell(arg) for arg in args)
    return hint.__name__


class _Reader(NamedTuple):
    parse: Callable[[Any, Any], Any] | None
    checks_itself: bool

    def convert(self, value: Any, hint: Any, where: str, *, optional: bool = False) -> Any:
        """The value, converted to the type of the annotation. `optional`: null would be taken too, as messages then say."""
        if self.parse is not None:
            value = self.parse(value, hint)
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if value is None:
                return None
            return self.convert(value, next(arg for arg in args if arg is not types.NoneType), where, optional=True)
        if dataclasses.is_dataclass(hint):
            if isinstance(value, dict) or not self.checks_itself:
                cls: Any = hint
                return from_dict(cls, value, where, parse=self.parse, checks_itself=self.checks_itself)
        elif origin is tuple:
            if isinstance(value, list | tuple) and (args[-1] is ... or len(value) == len(args)):
                return tuple(self.convert(item, args[0], f"{where}[{index}]") for index, item in enumerate(value))
        elif origin is dict:
            if isinstance(value, dict):
                return {key: self.convert(item, args[1], f"{where}[{key!r}]") for key, item in value.items()}
        elif origin is typing.Literal:
            if value in args and isinstance(value, str):
                return value
        elif hint is float:
            # YAML 1.1 needs a dot before the exponent and reads 5e-6 as text.
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                with contextlib.suppress(ValueError):
                    return float(value)
        elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
            return value
        if self.checks_itself:
            return value
        a_list = "a list of " if origin is tuple else ""
        or_null = "; null is possible too" if optional else ""
        raise ValueError(f"{where}: expected {a_list}{spell(hint)}, got {value!r}{or_null}")
