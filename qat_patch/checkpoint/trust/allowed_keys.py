"""The allowed keys of each config: those that its class in the installed host library knows, with plain values.

Unknown keys may hold numbers, because numbers name no code. Everything else is refused before a host library sees it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import logging
import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, cast

from qat_patch.metadata import CONFIG_KEYS, NOTICE, NOTICE_KEY, AttentionMetadata

from .adapter_keys import refused_in_adapters

_log = logging.getLogger(__name__)
_LARGEST_NUMBER = 1 << 22
_LARGEST_IN_A_SCHEDULER = 10**6
_MOST_LAYERS = 4096
_COUNTS = re.compile("layer|block|depth|expert")
_SIZES = re.compile("(size|dim)$|(vocab|hidden)_size")
"""Names of sizes, such as `vocab_size_per_layer_input` of Gemma 4, which are no counts."""
_OF_LAYERS = "per_layer_config"
"""What some layers have in place of the rest of a transformers config, by their numbers (Gemma 4)."""
_TEXT = re.compile(r"[\w.,:+=@ -]{0,200}")
"""Texts that may name a class, a function or a type, but no path, repository or terminal control code."""
# Keys that make a host library run code or download something. They are never allowed. Exporting a model with one of them
# fails; other unknown keys are left out.
LIVE = {
    *("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"),
    *("quantization_config", "compression_config", "custom_pipelines", "custom_generate", "transformers_weights"),
    *("backbone", "use_timm_backbone", "use_pretrained_backbone", "compile_config", "trust_remote_code"),
}
# Keys in every config of transformers. Their texts are for people or for other programs.
_OF_EVERY_CONFIG = {
    *("model_type", "torch_dtype", "rope_scaling", "rope_parameters", "tokenizer_class", "transformers.js_config"),
    *("task_specific_params", "prefix", "finetuning_task"),
}
_OF_TOKENIZERS = {
    *("tokenizer_class", "processor_class", "chat_template", "padding_side", "truncation_side", "truncation_strategy"),
    *("model_input_names", "added_tokens_decoder", "backend", "errors", "language", "task", "src_lang", "tgt_lang", "padding"),
    *("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens", "special_tokens", "response_schema"),
}
_OF_PROCESSORS = {
    *("image_processor_type", "feature_extractor_type", "video_processor_type", "processor_class", "_processor_class"),
    *("image_processor", "feature_extractor", "video_processor", "data_format", "input_data_format", "return_tensors"),
    *("model_input_names", "_valid_processor_keys", "_valid_kwargs_names", "chat_template"),
}
_PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TOKENIZERS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json")
CONFIGS = (
    *("config.json", "scheduler_config.json", "model_index.json", "generation_config.json", "adapter_config.json"),
    *_TOKENIZERS,
    *_PROCESSORS,
)
"""The names of configs; other JSON files hold data."""
_NAMES = ("_name_or_path", "name_or_path", "_model_name_or_path")
"""Where a model or GGUF file came from: kept for people, never loaded from."""


def check_config(where: str, name: str, config: dict[str, Any]) -> None:
    """Raise a ValueError for the first key of a config file that is not allowed."""
    for key in refused(where, name, config):
        raise ValueError(
            f"load_checkpoint: {where} sets {key!r}, which could run code from elsewhere or is unknown, and no export does; "
            "remove it, or get the folder from someone you trust"
        )


def refused(where: str, name: str, config: dict[str, Any]) -> Iterator[str]:
    """The keys of a config file that are not allowed.

    Args:
        where: the file, for messages.
        name: its name in the folder, which says what kind of config it is. Files that are no configs return nothing.
        config: its content.

    Raises:
        ValueError: the installed host library does not have its class.
    """
    if name == "config.json" and "_class_name" not in config:
        yield from _of_transformers(where, config)
    elif name in ("config.json", "scheduler_config.json", "model_index.json"):
        yield from _of_diffusers(where, name, config)
    elif name == "generation_config.json":
        from transformers import GenerationConfig

        known = set(vars(GenerationConfig())) - LIVE
        yield from (key for key, value in config.items() if not _is_allowed(key, value, known, free=True))
    elif name == "adapter_config.json":
        yield from refused_in_adapters(where, config)
    elif name in _TOKENIZERS:
        yield from _of_tokenizers(config)
    elif name in _PROCESSORS:
        yield from _of_processors(config)


def plain_config(where: str, name: str, config: dict[str, Any]) -> dict[str, Any]:
    """A config without the keys that its class does not know, which an export may not have.

    Raises:
        ValueError: one of these keys could run code.
    """
    ours = {key for key in (*CONFIG_KEYS.values(), NOTICE_KEY) if _is_our_entry(config.get(key))}
    unknown = list(refused(where, name, {key: value for key, value in config.items() if key not in ours}))
    if live := [key for key in unknown if key.rpartition(".")[2] in LIVE]:
        raise ValueError(
            f"load_checkpoint: {where} sets {live[0]!r}, which could run code from elsewhere; expected a model without it"
        )
    if unknown:
        _log.warning("%s: left out what the installed library does not know: %s", where, ", ".join(map(repr, unknown)))
    return _without(config, unknown)


def _without(config: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in keys}
    for head in config:
        if inner := [key.removeprefix(f"{head}.") for key in keys if key.startswith(f"{head}.")]:
            config[head] = _without(config[head], inner)
    return config


def check_sizes(where: str, name: str, config: Any, tensors: int, numbers: int) -> None:
    """Raise a ValueError if a number in a config is too large for the weights beside it.

    Otherwise a model of a million layers, or a table of a billion positions, would take all time or memory before a check of
    its weights could fail.
    """
    for path, value in _numbers(config):
        largest = _LARGEST_IN_A_SCHEDULER if name == "scheduler_config.json" else max(_LARGEST_NUMBER, numbers)
        key = re.sub(rf"{_OF_LAYERS}\.\d+\.", "", path)
        if name == "config.json" and _COUNTS.search(key) and not _SIZES.search(key):
            largest = max(_MOST_LAYERS, tensors)
        if abs(value) > largest and "theta" not in path:
            raise ValueError(
                f"load_checkpoint: {where}: {path}: expected at most {largest}, for the weights are {tensors} tensors of "
                f"{numbers} numbers, got {value}; the export is damaged, or hostile"
            )


def _of_transformers(where: str, config: dict[str, Any], default: Any = None) -> Iterator[str]:
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    cls: Any = CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else default
    if cls is None or not dataclasses.is_dataclass(cls):
        raise ValueError(
            f"load_checkpoint: {where}: model_type: expected one that the installed transformers knows, got {model_type!r}; "
            "upgrade transformers, or export again"
        )
    yield from _of_class(where, config, cls)


def _of_class(where: str, config: dict[str, Any], cls: Any) -> Iterator[str]:
    """The keys of a config of transformers that its class does not allow."""
    from transformers import GenerationConfig

    parts = getattr(cls, "sub_configs", {})
    known = (_attributes(cast(Hashable, cls)) | _OF_EVERY_CONFIG | set(GenerationConfig._get_default_generation_params())) - LIVE
    for key, value in config.items():
        if key in parts and isinstance(value, dict):
            part = parts[key] if dataclasses.is_dataclass(parts[key]) and parts[key].__name__ != "AutoConfig" else None
            yield from (f"{key}.{inner}" for inner in _of_transformers(f"{where}: {key}", value, part))
        elif key == _OF_LAYERS and hasattr(cls, key) and isinstance(value, dict):
            for number, layer in value.items():
                if not (number.isdecimal() and isinstance(layer, dict)):
                    yield f"{key}.{number}"
                else:
                    yield from (f"{key}.{number}.{inner}" for inner in _of_class(where, layer, cls))
        elif key in ("dtype", "torch_dtype"):
            if not _is_dtype(value):
                yield key
        elif key in ("id2label", "label2id", "task_specific_params", "transformers.js_config", "prefix"):
            if not _is_printable(value):
                yield key
        elif not _is_allowed(key, value, known) or (key not in known and _is_a_method(cls, key)):
            yield key


@functools.lru_cache
def _attributes(cls: Any) -> set[str]:
    """The keys of a transformers config class: its fields, their aliases, and derived attributes."""
    derived: set[str] = set()
    with contextlib.suppress(Exception):  # a few classes need arguments
        derived = {key for key in vars(cls()) if not key.startswith("_")}
    return {field.name for field in dataclasses.fields(cls)} | set(getattr(cls, "attribute_map", {})) | derived


def _arguments(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)


def _class_of_diffusers(name: str) -> Any:
    """A class of diffusers by its name, also one in the folder of a pipeline; None if it does not exist."""
    import diffusers

    if (found := getattr(diffusers, name, None)) is not None:
        return found
    for folder, names in _pipeline_folders().items():
        if name in names:
            return getattr(getattr(diffusers.pipelines, folder), name, None)
    return None


def _of_diffusers(where: str, name: str, config: dict[str, Any]) -> Iterator[str]:
    import diffusers

    class_name = config.get("_class_name")
    base: Any = {
        "config.json": diffusers.ModelMixin,
        "scheduler_config.json": diffusers.SchedulerMixin,
        "model_index.json": diffusers.DiffusionPipeline,
    }[name]
    is_name = isinstance(class_name, str) and class_name.isidentifier() and not class_name.startswith("_")
    cls: Any = _class_of_diffusers(str(class_name)) if is_name else None
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(
            f"load_checkpoint: {where}: _class_name: expected a class of diffusers or transformers that is a {base.__name__}, "
            f"got {class_name!r}; nothing else is loaded"
        )
    known = _arguments(cls) | {"_class_name", "_diffusers_version"}
    if name == "scheduler_config.json" and not config.keys() <= known:
        # Schedulers keep the settings of the scheduler that they were made from.
        known = known.union(*(_arguments(getattr(diffusers, each)) for each in dir(diffusers) if each.endswith("Scheduler")))
    for key, value in config.items():
        if name == "model_index.json" and isinstance(value, list):
            if not is_component(value):
                raise ValueError(
                    f"load_checkpoint: {where}: {key}: expected a class of diffusers or transformers, got {value!r}; nothing "
                    "else is loaded"
                )
            if key not in known:
                yield key
        elif not _is_allowed(key, value, known - LIVE):
            yield key


def _of_tokenizers(config: dict[str, Any]) -> Iterator[str]:
    import transformers

    cls: Any = getattr(transformers, str(config.get("tokenizer_class")), None)
    known = set(_OF_TOKENIZERS)
    if isinstance(cls, type):
        known = known.union(*map(_arguments, cls.__mro__))
    # These name files, which loading finds by their standard names.
    known -= {key for key in known if key.endswith(("_file", "_object", "args"))}
    for key, value in config.items():
        if key in ("tokenizer_class", "processor_class"):
            if not (value is None or (isinstance(value, str) and value.isidentifier())):
                yield key
        elif not (key.endswith(("_token", "_tokens")) and key.isidentifier()) and not _is_allowed(key, value, known, free=True):
            yield key


def _of_processors(config: dict[str, Any]) -> Iterator[str]:
    for key, value in config.items():
        if key in ("image_processor", "feature_extractor", "video_processor") and isinstance(value, dict):
            yield from (f"{key}.{inner}" for inner in _of_processors(value))
        elif not _is_allowed(key, value, _OF_PROCESSORS, free=key == "chat_template"):
            yield key


def _is_allowed(key: str, value: Any, known: set[str], *, free: bool = False) -> bool:
    """Whether a config may have this key and value. `free`: any text is allowed."""
    if key in (CONFIG_KEYS["diffusers"], NOTICE_KEY):
        return value is None or _is_our_entry(value)
    if key in _NAMES:
        return _is_printable(value)
    if key in known:
        return free or _is_plain(value, texts=True)
    if key in LIVE:
        return value is None or value is False
    return key.isidentifier() and not key.startswith("_") and _is_plain(value, texts=False)


def _is_our_entry(value: Any) -> bool:
    """Whether this is the attention metadata of an export, which is checked elsewhere."""
    return value == NOTICE or AttentionMetadata.is_ours(value)


def _is_plain(value: Any, *, texts: bool) -> bool:
    if isinstance(value, dict):
        return all(_TEXT.fullmatch(key) and key != "auto_map" and _is_plain(x, texts=texts) for key, x in value.items())
    if isinstance(value, list):
        return all(_is_plain(x, texts=texts) for x in value)
    return value is None or isinstance(value, bool | int | float) or (texts and _TEXT.fullmatch(value) is not None)


def _is_printable(value: Any) -> bool:
    if isinstance(value, dict):
        return all(key.isprintable() and _is_printable(x) for key, x in value.items())
    if isinstance(value, list):
        return all(map(_is_printable, value))
    return not isinstance(value, str) or value.isprintable()


def _is_dtype(value: Any) -> bool:
    import torch

    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else None
    return value is None or isinstance(found, torch.dtype)


def _is_a_method(cls: Any, key: str) -> bool:
    return callable(getattr(cls, key, None)) or isinstance(inspect.getattr_static(cls, key, None), property)


def is_component(value: list[Any]) -> bool:
    """Whether an entry of model_index.json names a class of diffusers or transformers, or an absent component."""
    if value == [None, None]:
        return True
    if len(value) != 2 or not all(isinstance(name, str) and name.isidentifier() for name in value):
        return False
    return value[0] in ("diffusers", "transformers") or value[0] in _pipeline_folders()


@functools.cache
def _pipeline_folders() -> dict[str, set[str]]:
    """The folders of diffusers' own pipelines, by which it names classes that stand in them, and the names in each; does not
    import it."""
    diffusers = importlib.util.find_spec("diffusers")
    places = diffusers.submodule_search_locations if diffusers is not None else None
    files = [file for place in places or () for file in Path(place, "pipelines").glob("*/__init__.py")]
    return {file.parent.name: set(re.findall(r"\w+", file.read_text(encoding="utf-8"))) for file in files}


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if not (not path and key in (*CONFIG_KEYS.values(), NOTICE_KEY)):
                yield from _numbers(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
