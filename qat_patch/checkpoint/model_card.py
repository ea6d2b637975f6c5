"""The model card of an export: what it is, how to run it, how it was trained, what was measured."""

from __future__ import annotations

from typing import Any

from qat_patch.metadata import AttentionMetadata


def model_card(
    metadata: AttentionMetadata,
    *,
    library: str,
    class_name: str,
    metrics: dict[str, float],
    base_model: str | None,
    is_adapter: bool,
) -> str:
    """The README.md of an export, with the Hub's YAML header."""
    from huggingface_hub import ModelCardData

    relation = "adapter" if is_adapter else "finetune" if metadata.training else "quantized"
    data = ModelCardData(
        library_name="peft" if is_adapter and library == "transformers" else library,
        pipeline_tag={"transformers": "text-generation", "diffusers": "text-to-video"}[library],
        base_model=base_model,
        base_model_relation=relation if base_model else None,
        tags=["nvfp4", "fp4", "qat", "attention", "qat-patch", *(["lora"] if is_adapter else [])],
    )
    spec = metadata.config.spec
    what = "adapters for ordinary" if is_adapter else "ordinary"
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {class_name} with 4-bit attention",
        f"These are {what} {class_name} weights. {len(metadata.modules)} attention modules expect NVFP4 attention: "
        f"Q and K in NVFP4, P and V in {spec.pv}"
        + (", with rotation" if spec.rotate else "")
        + (", with four-over-six scales" if spec.four_over_six else "")
        + ". Loaded without `qat_patch` they run ordinary attention.",
        "```python\nimport qat_patch\n\nmodel = qat_patch.load_checkpoint(FOLDER)\nprint(qat_patch.get_handle(model))\n```",
        "## Training",
        _table(_flatten(metadata.training))
        if metadata.training
        else "None: an ordinary checkpoint, switched to 4-bit attention.",
        "## Measured",
        _table(metrics) if metrics else "Nothing was measured at export.",
    ]
    return "\n\n".join(sections) + "\n"


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
