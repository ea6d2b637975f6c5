"""The model card of an export: what it is, how to run it, how it was trained, and what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qat_patch.linear.packed import FORMAT, LinearRecord
from qat_patch.metadata import LOADING_ADAPTERS, AttentionMetadata
from qat_patch.servers import SERVERS, SERVING


def model_card(
    metadata: AttentionMetadata,
    *,
    model: Any,
    library: str,
    metrics: dict[str, float],
    base_model: str | None,
    component: str | None,
    is_adapter: bool,
    server: str | None = None,
    linear: LinearRecord | None = None,
) -> str:
    """The README.md of an export, with the Hub's YAML header. `model`: what was exported, without wrappers."""
    from huggingface_hub import ModelCardData

    class_name = type(model).__name__
    relation = "adapter" if is_adapter else "finetune" if metadata.training else "quantized"
    base = base_model or _source(model)
    data = ModelCardData(
        library_name="peft" if is_adapter and library == "transformers" else library,
        pipeline_tag=_task(model, library),
        license=_license(base),
        # A local folder is not a name on the Hub.
        base_model=None if base is None or Path(base).exists() else base,
        base_model_relation=relation if base else None,
        datasets=_datasets(metadata.training or {}) or None,
        tags=["nvfp4", "fp4", "qat", "attention", "qat-patch", *([server] if server else []), *(["lora"] if is_adapter else [])],
    )
    spec = metadata.config.spec
    what = "adapters for ordinary" if is_adapter else "ordinary" if linear is None else "packed"
    load = "import qat_patch\n\n# A folder, or its name on the Hub with revision=...\n"
    load += "model = qat_patch.load_checkpoint(FOLDER)\nprint(qat_patch.get_handle(model))"
    if is_adapter and library == "diffusers":
        load += f"\n\n# original attention, in a plain pipeline\n{LOADING_ADAPTERS[component or 'transformer']}"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {class_name} with 4-bit attention",
        f"These are {what} {class_name} weights. {len(metadata.modules)} attention modules expect 4-bit attention "
        f"of the preset `{spec.preset}`: {spec.rules.what}"
        + (", with rotation" if spec.rotate else "")
        + (", with four-over-six scales" if spec.four_over_six else "")
        + ". Loaded without `qat_patch` they run ordinary attention."
        + (f" They are for the component `{component}` of the pipeline." if component else ""),
        *([] if linear is None else [_of_linears(linear, is_adapter)]),
        *([] if server is None else [f"Made for {SERVERS[server].name}: [{SERVING}]({SERVING}) has the command."]),
        f"```python\n{load}\n```",
        "## Training",
        _table(_flatten(metadata.training))
        if metadata.training
        else "These weights were not trained through 4-bit attention. They are an ordinary checkpoint that was patched.",
        "## Measured",
        _table(metrics) if metrics else "Nothing was measured at export.",
    ]
    return "\n\n".join(sections) + "\n"


def _of_linears(linear: LinearRecord, is_adapter: bool) -> str:
    number, what = len(linear.scales), "weights and inputs" if linear.config.rounds_inputs else "weights"
    if is_adapter:
        return (
            f"They were trained together with {number} linear layers whose {what} were rounded to NVFP4 "
            f"(`{linear.config.format}`)."
        )
    return (
        f"{number} linear layers are in NVFP4 too (`{linear.config.format}`: {what}), packed in the layout `{FORMAT}` of "
        "compressed-tensors. Transformers reads them if that package is installed."
    )


def _source(model: Any) -> str | None:
    """The name on the Hub that a model was loaded from, or None."""
    config = getattr(model, "config", None)
    name = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists() else None


def _license(base: str | None) -> str | None:
    """The license in the model card of the base model."""
    from huggingface_hub import ModelCard

    card = None if base is None else Path(base, "README.md")
    if card is None or not card.is_file():
        return None
    found = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict().get("license")
    return found if isinstance(found, str) else None


def _datasets(training: dict[str, Any]) -> list[str]:
    """Dataset names on the Hub in the settings of the data."""
    data = training.get("data") or training.get("text")
    found = data.get("dataset") or data.get("name") if isinstance(data, dict) else None
    return [found] if isinstance(found, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", found) else []


def _task(model: Any, library: str) -> str | None:
    """The Hub's name for the model's task, as its library lists it."""
    name = type(model).__name__.removeprefix("FSDP")
    if library == "transformers":
        from transformers.models.auto import modeling_auto

        listed: Any = modeling_auto
        mappings = {
            "text-generation": listed.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            "image-text-to-text": listed.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
            "text-classification": listed.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            "token-classification": listed.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
            "question-answering": listed.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
            "automatic-speech-recognition": listed.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
            "feature-extraction": listed.MODEL_MAPPING_NAMES,
        }
        return next((task for task, names in mappings.items() if name in _flat(names.values())), None)
    from diffusers.pipelines import auto_pipeline

    lists: Any = auto_pipeline
    if getattr(getattr(model, "config", None), "image_dim", None) is not None:
        return "image-to-video"
    by_task = {
        "text-to-image": lists.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        "image-to-image": lists.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        "text-to-video": lists.AUTO_TEXT2VIDEO_PIPELINES_MAPPING,
        "image-to-video": lists.AUTO_IMAGE2VIDEO_PIPELINES_MAPPING,
    }
    for task, mapping in by_task.items():
        # The pipeline itself, or one whose arguments take this transformer.
        if any(
            name == kind.__name__ or name in str(kind.__init__.__annotations__.get("transformer")) for kind in mapping.values()
        ):
            return task
    return "text-to-video"


def _flat(names: Iterable[Any]) -> set[str]:
    return {x for name in names for x in (name if isinstance(name, list | tuple) else [name])}


def _table(values: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {value:.6g} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in values.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
