"""qat-patch doctor: the machine, the versions, and what runs how."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qat_patch.measure.doctor import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report."""
    argparse.ArgumentParser(prog="qat-patch doctor", description=report.__doc__).parse_args(arguments)
    print(report())
