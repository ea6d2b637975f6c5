"""qat-patch doctor: the machine, the versions, and what runs how. --check tests and times the kernels for FP4 units.

qat-patch doctor
qat-patch doctor --check --report report.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from qat_patch.measure.doctor import report, self_check


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report. With `--check` run the self-check first.

    Raises:
        ValueError: there is nothing to check here, or the report cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="qat-patch doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="run the kernel for FP4 units on random tensors, for minutes, and keep the verdicts"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="with --check: write the whole report here, for a bug report")
    options = parser.parse_args(arguments)
    if options.report is not None and not options.check:
        raise ValueError("--report: has no effect without --check; add it, or leave it out")
    if options.report is not None and not options.report.absolute().parent.is_dir():
        raise ValueError(f"--report: expected a file in a folder that exists, got {options.report}")
    checked = self_check() if options.check else None
    words = report()
    print(words)
    if checked is not None:
        print(f"\nself-check of FP4 units\n{checked}")
    if options.report is not None and checked is not None:
        contents = {"report": words.splitlines(), "checked": checked.to_dict()}
        options.report.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
