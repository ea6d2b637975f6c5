"""Every table and figure of the documents in docs/evidence from the JSON beside them: `make evidence`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scripts.arguments import new_parser
from scripts.evidence.report.document import write
from scripts.evidence.results import FOLDER


def main(arguments: Sequence[str] | None = None) -> None:
    """Write tables and figures."""
    parser = new_parser("scripts.evidence.report", "tables and figures of the experiments")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="with the JSON, and for figures; default %(default)s")
    parser.add_argument("--documents", type=Path, default=FOLDER, help="folder of the documents; default %(default)s")
    options = parser.parse_args(arguments)
    write(options.documents, options.folder)


if __name__ == "__main__":
    main()
