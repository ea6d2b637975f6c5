"""The command line of the recipes: frozen dataclasses of settings, filled from a YAML file and `key=value` arguments."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml

import qat_kernels
import qat_patch
from qat_patch.config_reader import from_dict, spell

Settings = TypeVar("Settings")
_OURS = [Path(__file__).parent, *(Path(module.__path__[0]) for module in (qat_kernels, qat_patch))]


def read_settings(cls: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """Read settings from the command line: `--config FILE.yaml`, then `key=value`, which overrides the file.

    Keys of nested settings have dots (`data.sequence_length=256`), values are YAML (`betas=[0.9,0.95]`).

    Args:
        cls: a dataclass; its annotations say what each value must be.
        arguments: the command line without the program's name. Default: that of this process.

    Raises:
        ValueError: an unknown, missing or repeated key, a value of the wrong type or out of range, or no settings at all.
    """
    parser = argparse.ArgumentParser(
        description=inspect.getdoc(cls),
        epilog="settings:\n" + "\n".join(_describe(cls)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override those of the file")
    parsed = parser.parse_intermixed_args(arguments)
    if not parsed.config and not parsed.overrides:
        raise ValueError(
            "settings: got none; pass --config FILE.yaml, or key=value, or both. recipes/configs has files to begin with, and "
            "--help lists every setting"
        )
    values = _read_yaml(parsed.config) if parsed.config else {}
    for override in parsed.overrides:
        _override(values, override)
    return from_dict(cls, values, "settings", parse=_read_argument)


def run(main: Callable[[], object]) -> None:
    """Run a program. For a ValueError of ours only its message is printed, and the exit status is 1.

    Other errors keep their traceback, also a ValueError from another library.
    """
    try:
        main()
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(folder in Path(frames[-1].filename).parents for folder in _OURS):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def to_dict(settings: Any) -> dict[str, Any]:
    """Every setting as plain dicts, lists and scalars; `from_dict` is the inverse."""
    return yaml.safe_load(to_yaml(settings))


def to_yaml(settings: Any) -> str:
    """Every setting as YAML that `--config` reads."""
    return yaml.dump(dataclasses.asdict(settings), Dumper=_Dumper, sort_keys=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys, the form of the arguments."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


class _Argument(str):
    """A value as typed, and as YAML. The setting decides which of the two is used."""

    parsed: Any


def _read_argument(value: Any, hint: Any) -> Any:
    """The value of an argument for a setting with this annotation: YAML, unless text is expected. Other values do not change."""
    if not isinstance(value, _Argument):
        return value
    args = typing.get_args(hint)
    expected = hint if not args else next(arg for arg in args if arg is not types.NoneType)
    is_text = expected is str and typing.get_origin(hint) not in (tuple, dict)
    return str(value) if is_text and value.parsed is not None else value.parsed


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # PyYAML would silently take the last one.
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
    argument = _Argument(value)
    try:
        argument.parsed = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"settings.{path}: {value!r} is no YAML value: {error}") from error
    values[key] = argument


def _describe(cls: type, prefix: str = "", group: str = "") -> list[str]:
    """One paragraph for each setting in --help: name, type, default, and the docstring under the field.

    `group`: the settings that these belong to, if they may be left out as a whole.
    """
    documentation = _documentation(cls)
    lines, hints = [], typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = next(arg for arg in (*typing.get_args(hints[field.name]), hints[field.name]) if arg is not types.NoneType)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            name = prefix + field.name
            lines += _describe(hint, f"{name}.", name if field.default is None else group)
            continue
        required = f"required with {group}" if group else "required"
        default = required if field.default is dataclasses.MISSING else f"default {field.default}"
        default = default if field.default_factory is dataclasses.MISSING else f"default {field.default_factory()}"
        lines.append(f"  {prefix}{field.name} ({spell(hints[field.name])}; {default})")
        lines += textwrap.wrap(documentation[field.name], 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _documentation(cls: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and its bases."""
    found = {}
    for base in reversed(cls.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for statement, after in pairwise(ast.iter_child_nodes(definition)):
            match statement, after:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found
