"""The documents in docs/evidence with every table and figure as the JSON beside them has it.

A table stands between `<!-- table NAME -->` and `<!-- end -->` in one of the documents; what stands there is replaced. Figures
are PNG files in docs/evidence. An experiment has a module with TABLES and FIGURES, by name: functions of the results,
`results(FILE)` being the entries of docs/evidence/FILE.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from scripts.evidence.report import ablations as report_ablations
from scripts.evidence.report import serve as report_serve
from scripts.evidence.report import servers as report_servers
from scripts.evidence.report import trained as report_trained
from scripts.evidence.report import untrained as report_untrained
from scripts.evidence.report import video as report_video
from scripts.evidence.results import Entry, Results

EXPERIMENTS = (report_untrained, report_trained, report_ablations, report_serve, report_video, report_servers)
Load = Callable[[str], dict[str, Entry]]
_TABLE = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read(folder: Path) -> dict[Path, str]:
    """The documents of a folder."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))}


def render(documents: Mapping[Path, str], results: Load) -> dict[Path, str]:
    """The documents with their tables as the results have them.

    Raises:
        ValueError: the documents have a table that no experiment makes, or one twice, or lack one.
    """
    tables = {name: make for experiment in EXPERIMENTS for name, make in experiment.TABLES.items()}
    wanted = [match[1] for text in documents.values() for match in _TABLE.findall(text)]
    if sorted(wanted) != sorted(tables):
        raise ValueError(f"docs/evidence: expected each of the tables {sorted(tables)} once, got {sorted(wanted)}")

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}{tables[match[2]](results) or '*Not measured yet.*'}\n{match[4]}"

    return {path: _TABLE.sub(filled, text) for path, text in documents.items()}


def load(folder: Path) -> Load:
    """Reads the files of a folder, each once; a file that is not there has no entries."""
    return lru_cache(maxsize=None)(lambda name: Results(folder / f"{name}.json").entries())


def write(documents: Path, folder: Path) -> None:
    """Write the tables into the documents of a folder, and the figures into the folder that the results come from."""
    results = load(folder)
    for path, text in render(read(documents), results).items():
        path.write_text(text, encoding="utf-8")
    for experiment in EXPERIMENTS:
        for name, draw in experiment.FIGURES.items():
            draw(results, folder / f"{name}.png")
