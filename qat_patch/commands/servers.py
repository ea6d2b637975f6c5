"""qat-patch servers: which presets this machine can train, evaluate and serve, and what is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qat_patch.measure.servers import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="qat-patch servers", description=report.__doc__).parse_args(arguments)
    print(report())
