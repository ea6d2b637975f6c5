"""python -m qat_patch COMMAND"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import doctor, sensitivity_command
from .verify import verify_checkpoint


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 if it could not be done, or found what it looks for to be wrong."""
    parser = argparse.ArgumentParser(prog="python -m qat_patch", description="4-bit attention: tools for models and exports.")
    commands = parser.add_subparsers(dest="command", required=True)
    sensitivity = commands.add_parser("sensitivity", help="which layers suffer most from 4-bit attention, on real inputs")
    sensitivity_command.add_arguments(sensitivity)
    commands.add_parser("doctor", help="what this machine has, and what runs on it natively, emulated or not at all")
    verify = commands.add_parser("verify", help="check an export from end to end: hashes, weights and what it computes")
    verify.add_argument("folder", help="what export_checkpoint wrote")
    options = parser.parse_args(arguments)
    try:
        if options.command == "sensitivity":
            return sensitivity_command.run(options)
        if options.command == "doctor":
            print(doctor.report())
            return 0
        print("\n".join([*verify_checkpoint(options.folder), "verified"]))
    except ValueError as error:
        print(f"not verified: {error}" if options.command == "verify" else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
