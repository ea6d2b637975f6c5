"""python -m qat_patch verify FOLDER"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .verify import verify_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 if the export is not as it should be."""
    parser = argparse.ArgumentParser(prog="python -m qat_patch", description="4-bit attention: tools for exported checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="check an export from end to end", description=verify_checkpoint.__doc__)
    verify.formatter_class = argparse.RawDescriptionHelpFormatter
    verify.add_argument("folder", help="what export_checkpoint wrote")
    folder = parser.parse_args(arguments).folder
    try:
        print("\n".join(verify_checkpoint(folder)), "verified", sep="\n")
    except ValueError as error:
        print(f"not verified: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
