"""python -m qat_patch COMMAND"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import sensitivity_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 if it could not be done."""
    parser = argparse.ArgumentParser(prog="python -m qat_patch", description="4-bit attention: tools for models and exports.")
    commands = parser.add_subparsers(dest="command", required=True)
    sensitivity = commands.add_parser("sensitivity", help="which layers suffer most from 4-bit attention, on real inputs")
    sensitivity_command.add_arguments(sensitivity)
    options = parser.parse_args(arguments)
    try:
        return sensitivity_command.run(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
