"""The tables and figures of README.md, docs/EVIDENCE.md, docs/BENCHMARKS.md and docs/evidence: `make evidence`."""

from __future__ import annotations

from collections.abc import Sequence

from scripts.arguments import new_parser
from scripts.evidence.report.document import write


def main(arguments: Sequence[str] | None = None) -> None:
    """Write tables and figures."""
    new_parser("scripts.evidence.report", "tables and figures of experiments and benchmarks").parse_args(arguments)
    write()


if __name__ == "__main__":
    main()
