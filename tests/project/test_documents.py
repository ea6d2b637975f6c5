"""The documents lead somewhere: links, anchors, commands and settings that they name are there."""

import re
from pathlib import Path

import pytest

from qat_patch.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]*))?\)")


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target, anchor in LINK.findall(TEXTS[name]):
        path = ((ROOT / name).parent / target).resolve() if target else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{name} links to {target}#{anchor}"


@pytest.mark.parametrize("name", [name for name in TEXTS if name != "CHANGELOG.md"])
def test_programs_are_there(name):
    text = TEXTS[name]
    for module in re.findall(r"(?:python -m |\| `)(scripts(?:\.[a-z_]+)+)\b", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{name} names {module}"
    for command in re.findall(r"^(?:\s*|.*`)qat-patch ([a-z-]+)", text, re.MULTILINE):
        assert command in COMMANDS, f"{name} names qat-patch {command}"
    for path in re.findall(r"(?<!/)\brecipes/[\w/]+\.(?:py|yaml|ipynb)\b", text):
        assert (ROOT / path).exists(), f"{name} names {path}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name} names make {target}"


def test_the_first_screen_has_claims_install_and_use():
    """What a newcomer looks for, in this order, in the first 45 lines."""
    first = "\n".join(TEXTS["README.md"].splitlines()[:45])
    places = [first.index(part) for part in ("![", "- **", "## Install", "pip install", "## Use", "patch_model(model)")]
    assert places == sorted(places) and first.count("\n- **") == 3
