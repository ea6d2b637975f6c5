"""Paths in this repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
DOCS = ROOT / "docs"
BUILD = ROOT / "build"
"""Files that programs unpack and prepare; never committed."""
OUTPUTS = ROOT / "outputs"
"""Runs and their results; never committed."""
