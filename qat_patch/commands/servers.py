"""qat-patch servers: which presets this machine can train, evaluate and serve, and what is installed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qat_patch.measure.servers import report

ABOUT = """Show which presets this machine can train, evaluate and serve, which server programs are installed, and which server
serves which preset. It starts no server, and imports none."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="qat-patch servers", description=ABOUT).parse_args(arguments)
    print(report())
