from pathlib import Path

FILE = Path(__file__).parents[1] / "docs" / "SIZING.md"


def report(file): ...
