"""The table of experiment 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scripts.evidence.estimates import difference, estimate
from scripts.evidence.report.tables_and_figures import measured_on, table
from scripts.evidence.serve import plan


def _serve(results: Callable[[str], dict[str, Any]]) -> str:
    entries, rows = results("serve"), []
    for key, entry in sorted(entries.items()):
        for part, among in (("windows", "whole windows"), ("ends", f"last {entry['settings']['decoded']} tokens")):
            training = entry[part]["training"]["loss"]
            for name, found in entry[part].items():
                extra = difference([found["loss"]], [training])
                largest = max(map(abs, extra[0]))
                cells = [str(estimate([found["loss"]])), estimate(extra).signed(), f"{largest:.1e}"]
                cells += [f"{estimate([found['kl']]).mean:.1e}", f"{100 * estimate([found['other_choice']]).mean:.2f} %"]
                rows.append([key, among, name, *cells, f"`{key}` {part}.{name}"])
    head = (
        "training",
        "measured",
        "in",
        "loss",
        "against training",
        "largest of a window",
        "KL to training",
        "other first choice",
        "keys",
    )
    missing = "; ".join(key for key, _ in plan("cuda", entries) if key not in entries)
    left = f"\n\n*Not measured yet: {missing}.*" if missing else ""
    return f"{table(head, rows)}\n\n{measured_on(entries.values())} Keys are those of serve.json.{left}" if rows else ""


TABLES = {"serve": _serve}
FIGURES: dict[str, Any] = {}
