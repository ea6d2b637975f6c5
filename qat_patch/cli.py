"""qat-patch COMMAND (or python -m qat_patch COMMAND): all programs for users except the recipes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

COMMANDS = {
    "generate": "text or video from an export",
    "prepare-wan-data": "encode clips and captions for fine-tuning Wan",
    "evaluate": "what a model loses in each 4-bit attention, before any training: on text, tasks or samples",
    "sensitivity": "find the layers that lose most in 4-bit attention, on real inputs",
    "verify": "check an export from end to end: hashes, weights and outputs",
    "bench": "compare the speed of attention with other implementations: figure 5 of the paper",
    "doctor": "show this machine, and what runs on it natively, emulated or not at all",
    "servers": "show which presets this machine can train, evaluate and serve, and with what",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 1 if it failed, or if its check found a mistake."""
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
    # Import only the command that runs: packages of the others may be missing, and take seconds to import.
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
