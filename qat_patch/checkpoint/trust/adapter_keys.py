"""The allowed keys of an adapter config: the fields of PEFT's class, without values that name code or are slow to match."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

# Fields that hold text. PEFT uses some as regular expressions; the others are words.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters")
_WORDS = ("task_type", "peft_type", "bias", "peft_version", "init_lora_weights", "modules_to_save", "revision", "init_weights")
_FOR_PEOPLE = ("base_model_name_or_path",)
"""Fields that we never load from: the manifest names the base model."""
_LONGEST_PATTERN = 200
_MOST_BRANCHES = 4
_LARGEST_NUMBER = 1 << 20


def refused_in_adapters(where: str, config: dict[str, Any]) -> Iterator[str]:
    """The keys of an adapter config that are not allowed.

    Raises:
        ValueError: PEFT does not know this type of adapters.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = config.get("peft_type", "LORA")
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise ValueError(f"load_checkpoint: {where}: peft_type: expected one that the installed peft knows, got {kind!r}")
    defaults = {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in dataclasses.fields(cls)
        if field.init
    }
    for key, value in config.items():
        if key not in defaults or not (value == defaults[key] or value in ({}, None) or _is_allowed(key, value)):
            yield key


def _is_allowed(key: str, value: Any) -> bool:
    if key == "auto_mapping":
        # PEFT stores the class of the base model here.
        return isinstance(value, dict) and value.keys() <= {"base_model_class", "parent_library"} and _is_installed(value)
    if key in _FOR_PEOPLE:
        return isinstance(value, str) and value.isprintable()
    texts = [value] if isinstance(value, str) else [x for x in _leaves(value) if isinstance(x, str)]
    if key in _PATTERNS:
        return all(map(is_soon_matched, texts))
    if key in _WORDS:
        return all(re.fullmatch(r"[\w.+-]{0,200}", text, re.ASCII) for text in texts)
    numbers = [x for x in _leaves(value) if isinstance(x, int)]
    return not texts and not isinstance(value, dict) and all(abs(x) <= _LARGEST_NUMBER for x in numbers)


def is_soon_matched(pattern: str) -> bool:
    """Whether an untrusted regular expression matches in a time bounded by a low power of a name's length.

    Each quantifier and each group multiplies the ways to match; a quantifier after a group would multiply them without end.
    """
    bare = re.sub(r"\\[.dwsDWS]", "x", pattern)
    branches = len(re.findall(r"[*+?{(]", bare.replace("(?:", "(")))
    has_more = re.search(r"\\|\)[*+?{]|\(\?(?!:)|[*+?}][*+{]", bare)
    return len(pattern) <= _LONGEST_PATTERN and pattern.isprintable() and branches <= _MOST_BRANCHES and not has_more


def _is_installed(value: dict[str, Any]) -> bool:
    names = [value.get("base_model_class"), value.get("parent_library")]
    words = all(isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w.]*", name, re.ASCII) for name in names)
    return words and str(names[1]).split(".")[0] in ("transformers", "diffusers", "peft")


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value
