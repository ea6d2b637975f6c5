"""docs/MODELS.md, from the families and modes that the tests run. From the root of the project:

PYTHONPATH=.:tests python tests/support/families/models_table.py
"""

from collections.abc import Iterable
from pathlib import Path

from support.families import diffusers_families, every_causal_lm, every_transformer, transformers_families
from support.families.families import Family
from tests.patch.diffusers import test_diffusers_families
from tests.patch.transformers import test_transformers_families

FILE = Path(__file__).parents[3] / "docs" / "MODELS.md"
HEAD = """# Models and modes

`tests/support/families/models_table.py` writes this file from what the tests run; do not edit it. Every cell is a test on a
tiny model of that family, in `tests/patch/*/test_*_families.py` (most tests that compile run only with `-m slow`).

- **yes**: works. The test also checks the numbers: switched off and unpatched the model is bit-equal to the stock model,
  attention is called as often as the architecture says, and gradients are finite and non-zero wherever the stock model's
  are.
- **no**: refused with the message of that number, below the table.
- **-**: does not apply. Diffusers has no such mode for this model, or the mode fails without a patch too (a test makes sure).
"""


def render() -> str:
    """The whole file."""
    sections = [HEAD]
    hosts = (
        ("Diffusers", diffusers_families, test_diffusers_families.MODES),
        ("Transformers", transformers_families, test_transformers_families.MODES),
    )
    for host, families, modes in hosts:
        sections += [f"## {host}\n", _table(families.FAMILIES, modes)]
        sections += ["Refused as a whole:\n", *[f"- {family.name}: `{family.refused}`" for family in families.REFUSED], ""]
    return "\n".join([*sections, _every_transformer(), _every_class()])


EVERY_TRANSFORMER = """## Every transformer class of Diffusers {version}

`tests/support/families/every_transformer.py` built each class from a tiny config, patched it and compared it in float64.
Switched off, the model is bit-equal to the stock model; 4-bit attention agrees with the oracle, through the whole model, to
1e-9. `tests/patch/diffusers/test_every_transformer.py` repeats this (`-m slow`; some classes always).

- **exact**: all attention of the class is patched and right. {exact} classes and settings.
- **partly**: the modules that call the dispatcher are patched; the receipt names the others. {partly} classes.
- **refused**: with a message that says why. {refused} classes; {outside} of them, listed below the table, do not call
  attention through diffusers' dispatcher.

| class | 4-bit attention | modules patched | modules left | left or refused, and why |
|---|---|---|---|---|
"""


def _every_transformer() -> str:
    """What the last sweep found. It is a file, so that this takes no sweep."""
    rows = list(every_transformer.load().values())
    outside = [row["name"] for row in rows if row["outcome"] == "refused" and row["why"].endswith(every_transformer.OUTSIDE)]
    unexamined = [row for row in rows if row["outcome"] == "not examined"]
    count = {kind: sum(row["outcome"] == kind for row in rows) for kind in ("exact", "partly", "refused")}
    lines = [EVERY_TRANSFORMER.format(version=every_transformer.version(), outside=len(outside), **count).rstrip()]
    for row in rows:
        if row["name"] not in outside and row not in unexamined:
            numbers = (str(row["patched"]), str(row["others"]))
            lines.append(f"| {' | '.join([row['name'], row['outcome'], *numbers, _code(row['why'])])} |")
    lines += ["", f"Not through the dispatcher: {', '.join(outside)}.", "", "Not examined:", ""]
    lines += [f"- {row['name']}: {_code(row['why'])}" for row in unexamined]
    return "\n".join([*lines, ""])


EVERY = """## Every causal language model of Transformers {version}

`tests/support/families/every_causal_lm.py` built each class from a tiny config, patched it and compared it in float64.
Switched off, the model is bit-equal to the stock model; 4-bit attention agrees with the oracle through the whole model, with
padding, on a cache and on an FP4 cache. Sliding windows are 12 keys wide there, and chunks have 16 tokens.
`tests/patch/transformers/test_every_causal_lm.py` repeats this (`-m slow`; some classes always).

- **exact**: all attention of the class is patched and right. {exact} classes.
- **refused**: with a message that says why. {refused} classes; {outside} of them, listed below the table, do not call
  attention through transformers' AttentionInterface.

| class | 4-bit attention | refused, and why | FP4 cache |
|---|---|---|---|
"""


def _every_class() -> str:
    """What the last sweep found. It is a file, so that this takes no sweep."""
    rows = list(every_causal_lm.load().values())
    outside = [row["name"] for row in rows if row["why"] == every_causal_lm.OUTSIDE]
    unbuilt = [row["name"] for row in rows if row["outcome"] == "not built"]
    count = {kind: sum(row["outcome"].startswith(kind) for row in rows) for kind in ("exact", "refused")}
    lines = [EVERY.format(version=every_causal_lm.version(), outside=len(outside), **count).rstrip()]
    for row in rows:
        if row["name"] not in (*outside, *unbuilt):
            cache = "yes" if row["cache"] == "FP4" else _code(row["cache"])
            lines.append(f"| {' | '.join([row['name'], row['outcome'], _code(row['why']), cache])} |")
    lines += ["", f"Not through AttentionInterface: {', '.join(outside)}.", ""]
    lines += [f"Not examined, because the tiny config does not run or needs more packages: {', '.join(unbuilt)}.", ""]
    return "\n".join(lines)


def _code(text: str) -> str:
    return "; ".join(f"`{part}`" for part in text.split("; ")) if text else ""


def _table(families: list[Family], modes: Iterable[str]) -> str:
    messages = list(dict.fromkeys(message for family in families for message in family.refused_modes.values()))
    lines = [f"| | {' | '.join(modes)} |", f"|---|{'---|' * len(list(modes))}"]
    for family in families:
        cells = []
        for mode in modes:
            if mode in family.not_applicable:
                cells.append("-")
            elif mode in family.refused_modes:
                cells.append(f"no ({messages.index(family.refused_modes[mode]) + 1})")
            else:
                cells.append("yes")
        lines.append(f"| {family.name} | {' | '.join(cells)} |")
    lines += ["", *[f"{number}. `{message}`" for number, message in enumerate(messages, 1)], ""]
    notes = [
        f"- {family.name}: `AttnQATConfig(exclude={list(family.config.exclude)})`" for family in families if family.config.exclude
    ]
    return "\n".join(lines + ([*notes, ""] if notes else []))


if __name__ == "__main__":
    FILE.write_text(render(), encoding="utf-8")
