"""The table of experiment 1 on the language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.evidence import untrained
from scripts.evidence.report.tables_and_figures import measured_on


def _untrained(results: Callable[[str], dict[str, Any]]) -> str:
    entries = results("untrained_language")
    if not {"original", untrained.OURS} <= entries.keys():
        return ""
    keys = ", ".join(f"{title}: `{name}`" for name, title in untrained.ATTENTIONS.items() if name in entries)
    return f"{untrained.table(entries)}\n\n{measured_on(entries.values())} Keys in untrained_language.json: {keys}."


TABLES = {"untrained-language": _untrained}
FIGURES: dict[str, Any] = {}
