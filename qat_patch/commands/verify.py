"""qat-patch verify EXPORT: check an export from end to end."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qat_patch.checkpoint.verify import verify_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the results, one line each.

    Raises:
        ValueError: what is wrong with the export.
    """
    parser = argparse.ArgumentParser(prog="qat-patch verify", description=verify_checkpoint.__doc__)
    parser.add_argument("folder", help="what export_checkpoint wrote, or its name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    options = parser.parse_args(arguments)
    print("\n".join([*verify_checkpoint(options.folder, revision=options.revision), "verified"]))
