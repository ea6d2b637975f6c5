"""`python -m qat_patch COMMAND`: each command is a module of its own with a `main(arguments)`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {"doctor": "what this machine has, and what runs on it natively, emulated or not at all"}


def main(arguments: list[str]) -> None:
    """Run a command, or list them."""
    if not arguments or arguments[0] not in COMMANDS:
        lines = [f"  {name:12} {what}" for name, what in COMMANDS.items()]
        raise SystemExit("\n".join(["usage: python -m qat_patch COMMAND", *lines]))
    importlib.import_module(f".{arguments[0]}", __package__).main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
