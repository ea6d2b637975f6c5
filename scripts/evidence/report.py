"""Every table and figure of docs/EVIDENCE.md from the JSON in docs/evidence: `make evidence`.

A table stands between `<!-- table NAME -->` and `<!-- end -->` in the document; what stands there is replaced. Figures are PNG
files in docs/evidence. An experiment has a module with TABLES and FIGURES, by name: functions of the results, `results(FILE)`
being the entries of docs/evidence/FILE.json.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import report_ablations
import report_serve
import report_trained
import report_untrained
from results import FOLDER, Entry, Results

DOCUMENT = FOLDER.parent / "EVIDENCE.md"
EXPERIMENTS = (report_untrained, report_trained, report_ablations, report_serve)
Load = Callable[[str], dict[str, Entry]]
_TABLE = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(text: str, results: Load) -> str:
    """The document with its tables as the results have them.

    Raises:
        ValueError: the document has a table that no experiment makes, or lacks one.
    """
    tables = {name: make for experiment in EXPERIMENTS for name, make in experiment.TABLES.items()}
    wanted = [match[1] for match in _TABLE.findall(text)]
    if sorted(wanted) != sorted(tables):
        raise ValueError(f"EVIDENCE.md: expected each of the tables {sorted(tables)} once, got {sorted(wanted)}")
    return _TABLE.sub(lambda match: f"{match[1]}{tables[match[2]](results) or '*Not measured yet.*'}\n{match[4]}", text)


def load(folder: Path) -> Load:
    """Reads the files of a folder, each once; a file that is not there has no entries."""
    return lru_cache(maxsize=None)(lambda name: Results(folder / f"{name}.json").entries())


def main(arguments: Sequence[str] | None = None) -> None:
    """Write tables and figures."""
    parser = argparse.ArgumentParser(description="tables and figures of the experiments")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="with the JSON, and for figures; default %(default)s")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default %(default)s")
    options = parser.parse_args(arguments)
    results = load(options.folder)
    options.document.write_text(render(options.document.read_text(encoding="utf-8"), results), encoding="utf-8")
    for experiment in EXPERIMENTS:
        for name, draw in experiment.FIGURES.items():
            draw(results, options.folder / f"{name}.png")


if __name__ == "__main__":
    main()
