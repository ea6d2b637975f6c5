"""The files that a folder may hold: the allowlist of an export, and the files that we take from a base model of adapters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from qat_patch.layer import SHIFTS
from qat_patch.metadata import LOADING_ADAPTERS

MANIFEST = "qat_patch.json"
"""Written last: the kind of export, and size and SHA-256 of every file that loading may read."""
README = "README.md"
MAY_COME_LATER = frozenset({README, "chat_template.jinja"})
"""Known files that may be added to an export later."""
SHIFT_FILES = {which: f"qat_patch_{which}.safetensors" for which in SHIFTS}
"""Beside the weights of a model: a float32 tensor [key heads, head dim] for each patched module, by its name."""
REFERENCE = "qat_patch_reference.safetensors"
"""Beside the weights of a model: an input and the exported model's output for it; see golden_output.py."""
REFERENCE_FOR_SERVERS = "qat_patch_reference.st"
"""The same in an export for a server: vLLM and SGLang load every *.safetensors of a folder as weights."""

_SHARD = r"(?:-\d{5}-of-\d{5})?\.safetensors"
_WEIGHTS = rf"(?:model|diffusion_pytorch_model)(?:{_SHARD}|\.safetensors\.index\.json)"
_ADAPTERS = r"adapter_config\.json|adapter_model\.safetensors|pytorch_lora_weights\.safetensors"
_CONFIGS = r"(?:config|generation_config|scheduler_config|preprocessor_config|video_preprocessor_config|processor_config)\.json"
_TOKENIZER = (
    r"(?:tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|tekken|normalizer|unigram)\.json"
    r"|(?:tokenizer|spiece|sentencepiece|sentencepiece\.bpe|spm|vocab|tiktoken)\.model"
    r"|vocab\.txt|merges\.txt|chat_template\.jinja"
)
# Files that a server reads, but no host library.
_FOR_SERVERS = ("hf_quant_config.json",)
_OURS = (*SHIFT_FILES.values(), REFERENCE, REFERENCE_FOR_SERVERS)
_LOADED = re.compile("|".join((_WEIGHTS, _ADAPTERS, _CONFIGS, _TOKENIZER, *map(re.escape, _OURS))), re.ASCII)
_CHAT_TEMPLATE = re.compile(r"[\w-]{1,64}\.jinja", re.ASCII)
# For people; host libraries never see them: pictures of a model card, licences, and files that the Hub adds.
_FOR_PEOPLE = re.compile(
    r"LICEN[CS]E|NOTICE|COPYING|CITATION\.cff|\.gitattributes|[\w][\w .-]*\.(?:md|txt|png|jpe?g|gif|webp|svg|mp4|webm)",
    re.ASCII | re.IGNORECASE,
)
CHAT_TEMPLATES = "additional_chat_templates"
LEFT_BY_DOWNLOADS = (".git", ".cache")
"""Folders at the top that git and `hf download` leave; we ignore them."""
_PLAIN = re.compile(r"(?:[A-Za-z0-9_][\w.+-]*/)*[A-Za-z0-9_][\w.+-]*", re.ASCII)
_LONGEST_NAME = 255
_BESIDE_WEIGHTS = ("config.json", "generation_config.json", *SHIFT_FILES.values())


def holds_tokenizer(names: Iterable[str]) -> bool:
    """Whether a folder with these files has a tokenizer. Without one Transformers builds an empty one from the model's config."""
    return any(re.fullmatch(_TOKENIZER, name) and not name.startswith("chat_template.") for name in names)


def check_plain(where: str, name: object) -> None:
    """Raise a ValueError unless a file name that a file gives is plain and stays in the folder."""
    if not isinstance(name, str) or len(name) > _LONGEST_NAME or not _PLAIN.fullmatch(name):
        raise ValueError(
            f"load_checkpoint: {where}: expected names of files in the folder, without .. and the like, got {name!r}; the export "
            "is damaged, or hostile"
        )


def check_names(where: str, found: Collection[str], recorded: Collection[str], kind: str, components: Collection[str]) -> None:
    """Raise a ValueError unless a folder holds only files that this kind of export may hold, and that were exported.

    Args:
        where: the folder, for messages.
        found: all regular files in it, as `part/name`.
        recorded: the files that the manifest lists.
        kind: `model`, `pipeline` or `adapters`.
        components: the folders of a pipeline.
    """
    for name in sorted(found):
        *folders, file = name.split("/")
        if name == MANIFEST or (not folders and _FOR_PEOPLE.fullmatch(file) and not is_loaded(name)):
            continue
        if folders and folders[-1] == CHAT_TEMPLATES:
            folders.pop()
            is_known = _CHAT_TEMPLATE.fullmatch(file) is not None
        else:
            is_known = is_loaded(name) or (
                not folders and (file in _FOR_SERVERS or (kind == "pipeline" and file == "model_index.json"))
            )
        if not is_known or not (not folders or (len(folders) == 1 and folders[0] in components)):
            raise ValueError(
                f"load_checkpoint: {where} holds {name}, which could run code or is unknown, and no export does; remove it, or "
                "get the folder from someone you trust"
            )
        if name not in recorded and name not in MAY_COME_LATER:
            raise ValueError(
                f"load_checkpoint: {where} holds {name}, which was not there when it was exported; remove it, or export again"
            )
        if re.fullmatch(_ADAPTERS, file) and kind != "adapters":
            raise ValueError(f"load_checkpoint: {where} is an export of a {kind} and holds adapters too ({name}); remove them")


def is_loaded(name: str) -> bool:
    """Whether a host library may read a file of this name."""
    return _LOADED.fullmatch(name.rpartition("/")[2]) is not None


def is_weights(name: str) -> bool:
    """Whether a file holds tensors. Such a file is read in place, not copied."""
    return name.endswith(".safetensors")


def weights_of_a_base_model(host: str) -> list[str]:
    """Patterns of the files to download of a base model. They match no other parts of a pipeline."""
    stem = "model" if host == "transformers" else "diffusion_pytorch_model"
    names = [*_BESIDE_WEIGHTS, f"{stem}*.safetensors", f"{stem}.safetensors.index.json"]
    return names if host == "transformers" else [*names, *(f"{part}/{name}" for part in LOADING_ADAPTERS for name in names)]


def of_a_base_model(name: str) -> bool:
    """Whether we take this file of a base model: its config and weights, for a pipeline those of its transformer."""
    folder, _, file = name.rpartition("/")
    return folder in ("", *LOADING_ADAPTERS) and (file in _BESIDE_WEIGHTS or re.fullmatch(_WEIGHTS, file) is not None)
