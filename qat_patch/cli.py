"""qat-patch COMMAND (or python -m qat_patch COMMAND): every program that users run besides the recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "generate": "text or video from an export",
    "prepare-wan-data": "encode clips and captions, to fine-tune Wan on them",
    "evaluate": "what a model loses in each 4-bit attention, before any training: on text, tasks or samples",
    "sensitivity": "which layers lose most in 4-bit attention, on real inputs",
    "verify": "check an export from end to end: hashes, weights and what it computes",
    "bench": "the speed of attention here and that of other implementations: figure 5 of the paper",
    "doctor": "what this machine has, and what runs on it natively, emulated or not at all",
    "servers": "which presets this machine can train, evaluate and serve, and with what",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 1 if it could not be done, or found what it looks for to be wrong."""
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="qat-patch",
        description="4-bit attention: tools for models and exports. `qat-patch COMMAND --help` says more.",
        epilog="commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=[*COMMANDS], metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        _command(options.command)(options.arguments)
    except ValueError as error:
        print(f"not verified: {error}" if options.command == "verify" else error, file=sys.stderr)
        return 1
    return 0


def _command(name: str) -> Callable[[Sequence[str]], object]:
    # Only the one that runs is imported: the others' packages may be missing, and take seconds to import.
    if name == "generate":
        from .commands.generate import main
    elif name == "prepare-wan-data":
        from .commands.prepare_wan_data import main
    elif name == "evaluate":
        from .commands.evaluate import main
    elif name == "servers":
        from .commands.servers import main
    elif name == "sensitivity":
        from .commands.sensitivity import main
    elif name == "bench":
        from .commands.bench import main
    elif name == "verify":
        from .commands.verify import main
    else:
        from .commands.doctor import main
    return main
