"""The tables of `make demo` and `make demo-wan`, from the results.json that each wrote: docs/benchmarks has copies."""

from __future__ import annotations

from typing import Any

from scripts import demo, demo_wan
from scripts.evidence.report.speed import stored
from scripts.evidence.report.tables_and_figures import table


def _language(_: Any) -> str:
    return demo.losses(stored("demo"))


def _video(_: Any) -> str:
    return demo_wan.losses(stored("demo_wan"))


def _samples(_: Any) -> str:
    """Of the demo for video."""
    distances = stored("demo_wan")["psnr_to_original"]
    return table(("samples", "PSNR, dB"), [(name, f"{value:.1f}") for name, value in distances.items()])


TABLES = {"demo-first": _language, "demo": _language, "demo-wan": _video, "demo-wan-samples": _samples}
FIGURES: dict[str, Any] = {}
