"""The command lines of the programs here, which are run as modules from the root of the repository."""

from __future__ import annotations

import argparse


def new_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows how a module of this repository is started, and its description line by line."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
