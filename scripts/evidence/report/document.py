"""Every table and figure of the experiments in the documents, as the JSON in docs/evidence has it, and the tables of speed.

A table stands between `<!-- table NAME -->` and `<!-- end -->` in one of DOCUMENTS; what stands there is replaced.
docs/SIZING.md is written whole. Figures are PNG files in docs/evidence. An experiment has a module with TABLES and FIGURES,
by name: functions of the results, `results(FILE)` being the entries of docs/evidence/FILE.json.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path

from scripts.bench import sizing_report
from scripts.evidence.report import ablations as report_ablations
from scripts.evidence.report import advice as report_advice
from scripts.evidence.report import demos as report_demos
from scripts.evidence.report import length as report_length
from scripts.evidence.report import serve as report_serve
from scripts.evidence.report import servers as report_servers
from scripts.evidence.report import several_gpus as report_several_gpus
from scripts.evidence.report import speed as report_speed
from scripts.evidence.report import summary as report_summary
from scripts.evidence.report import trained as report_trained
from scripts.evidence.report import untrained as report_untrained
from scripts.evidence.report import video as report_video
from scripts.evidence.results import FOLDER, Entry, Results
from scripts.paths import DOCS, ROOT

DOCUMENTS = (
    ROOT / "README.md",
    DOCS / "EVIDENCE.md",
    DOCS / "BENCHMARKS.md",
    *sorted(FOLDER.glob("*.md")),
    sizing_report.FILE,
)
EXPERIMENTS = (
    report_untrained,
    report_trained,
    report_ablations,
    report_serve,
    report_video,
    report_servers,
    report_length,
    report_summary,
    report_advice,
    report_speed,
    report_several_gpus,
    report_demos,
)
Load = Callable[[str], dict[str, Entry]]
_TABLE = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def read() -> dict[Path, str]:
    """The documents as they are."""
    return {path: path.read_text(encoding="utf-8") for path in DOCUMENTS}


def render(documents: Mapping[Path, str], results: Load) -> dict[Path, str]:
    """The documents with their tables as the results have them.

    Raises:
        ValueError: the documents have a table that no experiment makes, or one twice, or lack one.
    """
    tables = {name: make for experiment in EXPERIMENTS for name, make in experiment.TABLES.items()}
    wanted = [match[1] for text in documents.values() for match in _TABLE.findall(text)]
    if sorted(wanted) != sorted(tables):
        raise ValueError(f"documents: expected each of the tables {sorted(tables)} once, got {sorted(wanted)}")

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}{tables[match[2]](results) or '*Not measured yet.*'}\n{match[4]}"

    rendered = {path: _TABLE.sub(filled, text) for path, text in documents.items()}
    return rendered | {sizing_report.FILE: sizing_report.report(sizing_report.measured())}


def load(folder: Path) -> Load:
    """Reads the files of a folder, each once; a file that is not there has no entries."""
    return lru_cache(maxsize=None)(lambda name: Results(folder / f"{name}.json").entries())


def write() -> None:
    """Write the tables into the documents, and the figures beside the results."""
    results = load(FOLDER)
    for path, text in render(read(), results).items():
        path.write_text(text, encoding="utf-8")
    for experiment in EXPERIMENTS:
        for name, draw in experiment.FIGURES.items():
            draw(results, FOLDER / f"{name}.png")
