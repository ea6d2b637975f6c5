"""docs/MODELS.md, from the families and modes that the tests run. From the root of the project:

PYTHONPATH=.:tests python tests/support/families/models_table.py
"""

from collections.abc import Iterable
from pathlib import Path

from support.families import diffusers_families, every_causal_lm, every_transformer, transformers_families
from support.families.families import Family
from tests.patch.diffusers import test_diffusers_families
from tests.patch.transformers import test_published_models, test_transformers_families, test_vision_language

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
    return "\n".join([*sections, _published(), _every_transformer(), _every_class(), _vision_language(), CACHES])


PUBLISHED = """## Families with the head dims that are published

`tests/patch/transformers/test_published_models.py` runs each of these tiny, and with the head counts, head dims and windows of
the table; hidden sizes and numbers of layers are tiny. In float64 and to 1e-9: outputs and all gradients are those of the
oracle, alone and with padding on the left and on the right (there gradients of the tiny ones); switched off it is the stock
model; tokens on a cache, and on an FP4 cache, are those without one, and `generate` gives the same tokens; packed samples are as
if alone. Windows of 4,096 keys take `-m slow`; Llama 4's chunks have 16 tokens there, and not 8,192.

| | heads of Q, of K | head dim | window | left | packed samples | FP4 cache |
|---|---|---|---|---|---|---|
"""


def _published() -> str:
    """The kinds that the test goes through."""
    lines = [PUBLISHED.rstrip()]
    for kind in test_published_models.KINDS:
        if kind.changes is not None:
            sizes = kind.changes.get("text_config", kind.changes)
            head_dim = str(sizes["head_dim"])
            if "v_head_dim" in sizes:
                head_dim = f"{sizes['qk_nope_head_dim']} + {sizes['qk_rope_head_dim']}, V: {sizes['v_head_dim']}"
            cells = [
                kind.family.removesuffix("_text"),
                f"{sizes['num_attention_heads']}, {sizes['num_key_value_heads']}",
                head_dim,
                str(sizes.get("sliding_window", "")),
                _code("; ".join(dict.fromkeys(kind.skipped.values()))),
                "yes" if kind.packed is None else _code(kind.packed),
                "yes" if kind.cache is None else _code(kind.cache),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    block_causal = (
        "SkyReels V2, causal by chunks of five frames, has 12 heads of 128 in `tests/patch/diffusers/test_block_masks.py`."
    )
    return "\n".join([*lines, "", block_causal, ""])


VISION_LANGUAGE = """## Models that see and hear

`patch_model` patches the language model. Encoders of pictures and sound keep their attention. The receipt names each module whose
attention goes through AttentionInterface, with the reason, `not causal: only decoder self-attention is supported`.
`tests/patch/transformers/test_vision_language.py` compares these with the stock model and with the oracle; Qwen3-VL also with a
picture among the words, with padding, and in `generate`: {classes}.
`Llama4ForConditionalGeneration` of Transformers 5.24.0 fails without a patch too, in its own forward. PaliGemma is refused: all
tokens of its prompt see each other.
"""


def _vision_language() -> str:
    return VISION_LANGUAGE.format(classes=", ".join(f"`{name}`" for name in test_vision_language.CLASSES.values()))


CACHES = """## Caches

- **FP4 cache of language models**: "yes" above means that patched modules keep keys and values in NVFP4. Modules that cannot
  keep the ordinary cache: in Gemma 4 and Gemma 3n the last layer of each kind, which hands its keys and values on to other
  layers. With a window a group of 16 tokens is freed when all of it has left the window.
- **Encoder-decoders** (BART, Marian, Pegasus): the decoder's self-attention is patched, and has an FP4 cache. Keys and values of
  the encoder's output stay as they are, in the ordinary cache beside it, because cross-attention is not patched.
- **Rolling caches of autoregressive video**: two models of Diffusers have one. SANA-WM's refiner is patched, and each block of
  frames is that of the oracle (`tests/patch/diffusers/test_caches_of_the_host.py`). AnyFlow FAR insists on flex attention: its
  self-attention is left, and its cross-attention is patched. SkyReels V2 and Helios keep frames, and compute keys and values
  again. Self-Forcing, CausVid and LongLive are no classes of Diffusers.
- **What caches of Diffusers hold stays in the dtype of the model**, also the keys and values of reference pictures that Flux 2,
  GLM-Image, Qwen-Image 2.1 (in the same tests) and Wan Animate 2 keep; `handle.cache()` refuses models of Diffusers. Their
  processors store plain tensors and join them themselves. A window that moves by frames also moves the groups of 16 tokens that
  share a scale of V, so what was stored in NVFP4 would not be what 4-bit attention computes without a cache.
"""


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
