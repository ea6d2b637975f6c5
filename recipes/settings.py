"""Settings of the recipes: frozen dataclasses, filled from a YAML file and `key=value` arguments, strictly."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qat_patch.config import check_keys

Settings = TypeVar("Settings")


def read_settings(cls: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """Settings from the command line: `--config FILE.yaml` and then `key=value`, which wins.

    Keys of nested settings have dots (`data.sequence_length=256`), values are YAML (`betas=[0.9,0.95]`).

    Args:
        cls: a dataclass; its annotations say what each value must be.
        arguments: the command line without the program's name. Default: that of this process.

    Raises:
        ValueError: an unknown, missing or repeated key, or a value of the wrong type or out of range.
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(cls),
        epilog="settings:\n" + "\n".join(_describe(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over those of the file")
    parsed = parser.parse_intermixed_args(arguments)
    values = _read_yaml(parsed.config) if parsed.config else {}
    for override in parsed.overrides:
        _override(values, override)
    return from_dict(cls, values)


def from_dict(cls: type[Settings], values: Any, where: str = "settings") -> Settings:
    """A dataclass from plain values; missing keys take their defaults. `to_dict` is the inverse.

    Raises:
        ValueError: as `read_settings`.
    """
    fields = dataclasses.fields(cls)
    check_keys(where, values, [field.name for field in fields])
    for field in fields:
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values:
            raise ValueError(f"{where}: {field.name!r} is missing; set it in the file or as an argument")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def to_dict(settings: Any) -> dict[str, Any]:
    """Every setting as plain dicts, lists and scalars."""
    return yaml.safe_load(to_yaml(settings))


def to_yaml(settings: Any) -> str:
    """Every setting as YAML that `--config` reads."""
    return yaml.dump(dataclasses.asdict(settings), Dumper=_Dumper, sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys, the form of the arguments."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _Argument(str):
    """A value as it was typed: YAML, unless text is expected."""


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # PyYAML lets the last one win: a setting without effect.
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} occurs twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config: there is no file {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--config: {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path}: expected a mapping of settings, got {values!r}")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    *parents, key = path.split(".")
    if not equals or not all([*parents, key]):
        raise ValueError(f"arguments: expected key=value, such as steps=100 or data.sequence_length=256, got {override!r}")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"arguments: {override!r}: {parent!r} is set to {values!r} and has no settings inside")
    values[key] = _Argument(value)


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, _Argument):
        text = hint if not args else next(arg for arg in args if arg is not types.NoneType)
        try:
            parsed = yaml.load(value, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{where}: {str(value)!r} is no YAML value: {error}") from error
        value = str(value) if text is str and origin not in (tuple, dict) and parsed is not None else parsed
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        hint = next(arg for arg in args if arg is not types.NoneType)
        return _convert(value, hint, where)
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple) or (args[-1] is not ... and len(value) != len(args)):
            raise ValueError(f"{where}: expected a list of {_spell(hint)}, got {value!r}")
        return tuple(_convert(item, args[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected {_spell(hint)}, got {value!r}")
        return {key: _convert(item, args[1], f"{where}[{key!r}]") for key, item in value.items()}
    if origin is typing.Literal:
        if value in args and isinstance(value, str):
            return value
    elif hint is float:
        # YAML 1.1 wants a dot before the exponent and reads 5e-6 as text.
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                return float(value)
            except ValueError:
                pass
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: expected {_spell(hint)}, got {value!r}")


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return ", ".join("..." if arg is ... else _spell(arg) for arg in typing.get_args(hint))
    if typing.get_origin(hint) is dict:
        return f"a mapping to {_spell(typing.get_args(hint)[1])}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if arg is types.NoneType else _spell(arg) for arg in typing.get_args(hint))
    return hint.__name__


def _describe(cls: type, prefix: str = "") -> list[str]:
    """One paragraph a setting for --help: name, type, default, and the docstring under the field."""
    documentation = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                documentation[field.target.id] = " ".join(text.value.value.split())
    lines, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = next(arg for arg in (*typing.get_args(hints[field.name]), hints[field.name]) if arg is not types.NoneType)
        if dataclasses.is_dataclass(hint):
            lines += _describe(hint, f"{prefix}{field.name}.")
            continue
        default = "required" if field.default is dataclasses.MISSING else f"default {field.default}"
        default = default if field.default_factory is dataclasses.MISSING else f"default {field.default_factory()}"
        lines.append(f"  {prefix}{field.name} ({_spell(hints[field.name])}; {default})")
        lines += textwrap.wrap(documentation[field.name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines
