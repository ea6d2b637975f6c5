"""Check an export from end to end, on the CPU and without the original model.

qat-patch verify outputs/run/export

Every file must have its recorded hash; config, headers, index and shifts must belong together; every weight must be finite,
and loaded with the shape and type that it has in the file; and the model must give the recorded output for the reference input.
It prints a line for each check, and "verified" at the end. The exit status is 1 if something is wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from qat_patch.checkpoint.verify import verify_checkpoint


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the results, one line each.

    Raises:
        ValueError: what is wrong with the export.
    """
    parser = argparse.ArgumentParser(
        prog="qat-patch verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="what export_checkpoint wrote, or its name on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub (default: main)")
    options = parser.parse_args(arguments)
    print("\n".join([*verify_checkpoint(options.folder, revision=options.revision), "verified"]))
