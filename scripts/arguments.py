"""Command lines of the programs here. They run as modules from the root of the repository."""

from __future__ import annotations

import argparse


def new_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows how to start a module of this repository, and keeps the lines of its description."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
