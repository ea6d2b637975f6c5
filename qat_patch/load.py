"""Load an export and patch it as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .block import ADAPTER_FILE, CONFIG_KEYS, METHOD, AttentionBlock
from .patch import get_handle, patch_model


def load_checkpoint(folder: str | Path, *, dtype: torch.dtype | str = "auto", device: str | torch.device | None = None) -> Any:
    """Load an export and patch it as it was.

    Args:
        folder: what `export_checkpoint` wrote.
        dtype: of the weights; default: as exported.
        device: where to move the model.

    Returns:
        What was exported, patched: a Transformers model, a Diffusers transformer or a Diffusers pipeline, in evaluation
        mode; of an export of adapters alone the base model with these adapters. `get_handle` has the receipt.

    Raises:
        ValueError: the folder is no export of this package, or its config and weights do not belong together.
    """
    folder = Path(folder)
    blocks = read_blocks(folder)
    if (folder / "model_index.json").is_file():
        model = _load_pipeline(folder, blocks, dtype)
    elif (folder / ADAPTER_FILE).is_file():
        model = _load_adapters(folder, blocks[""], dtype)
    else:
        model = _load_model(folder, blocks[""], dtype)
    for name, block in blocks.items():
        part = getattr(model, name) if name else model
        block.check_modules(list(get_handle(part).patched))
        if torch.device(device or "cpu").type == "cpu":
            _align(part)
    return model if device is None else model.to(device)


def read_blocks(folder: Path) -> dict[str, AttentionBlock]:
    """The attention blocks of an export by subfolder: one under "" for a model or adapters, one a transformer for a pipeline.

    Raises:
        ValueError: the folder is no export of this package, or its config and weights do not belong together.
    """
    if (folder / "model_index.json").is_file():
        configs = {file.parent.name: _read_json(file) for file in sorted(folder.glob("*/config.json"))}
        stored = {name: config.get(CONFIG_KEYS["diffusers"]) for name, config in configs.items()}
        blocks = {name: block for name, block in stored.items() if AttentionBlock.is_ours(block)}
        if not blocks:
            raise ValueError(
                f"load_checkpoint: no model in {folder} has an attention block of qat_patch; load it with diffusers and call "
                "patch_model"
            )
    elif (folder / ADAPTER_FILE).is_file():
        blocks = {"": _read_json(folder / ADAPTER_FILE).get("attention")}
    else:
        config = _read_json(folder / "config.json")
        blocks = {"": config.get(CONFIG_KEYS["diffusers" if "_class_name" in config else "transformers"])}
    return {name: _checked_block(folder / name, block) for name, block in blocks.items()}


def _load_model(folder: Path, block: AttentionBlock, dtype: torch.dtype | str) -> torch.nn.Module:
    if "_class_name" in _read_json(folder / "config.json"):
        from diffusers import AutoModel

        model = AutoModel.from_pretrained(str(folder), local_files_only=True, **_dtype(dtype))
        patch_model(model, block.config)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)  # our quantizer patches it
    return model.eval()


def _load_pipeline(folder: Path, blocks: dict[str, AttentionBlock], dtype: torch.dtype | str) -> Any:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **_dtype(dtype))
    for name, block in blocks.items():
        patch_model(getattr(pipeline, name), block.config)
    return pipeline


def _load_adapters(folder: Path, block: AttentionBlock, dtype: torch.dtype | str) -> torch.nn.Module:
    base = _read_json(folder / ADAPTER_FILE)["base_model"]
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        patch_model(model, block.config)
        model = PeftModel.from_pretrained(model, folder)
    else:
        from diffusers import AutoModel

        subfolder = {} if (Path(base) / "config.json").is_file() else {"subfolder": "transformer"}
        model = AutoModel.from_pretrained(base, **subfolder, **_dtype(dtype))
        patch_model(model, block.config)
        model.load_lora_adapter(str(folder), prefix=None, weight_name="pytorch_lora_weights.safetensors")
    return model.eval()


def _align(model: torch.nn.Module) -> None:
    """Move weights out of the mapped file: there they start at any address, and CPU matrix products round by address."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()


def _dtype(dtype: torch.dtype | str) -> dict[str, Any]:
    """diffusers has no "auto"; without the argument it loads float32."""
    return {} if dtype == "auto" else {"dtype": dtype}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"load_checkpoint: {file} does not exist; expected a folder that export_checkpoint wrote")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {file} is not JSON ({error}); the export is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_checkpoint: {file}: expected a JSON object, got {type(content).__name__}; the export is damaged")
    return content


def _checked_block(folder: Path, stored: Any) -> AttentionBlock:
    """The block of a model's config, which must be that of its weights too."""
    if not AttentionBlock.is_ours(stored):
        raise ValueError(
            f"load_checkpoint: the config in {folder} has no attention block of qat_patch (got {stored!r}); load it with its own "
            "library and call patch_model"
        )
    block = AttentionBlock.from_dict(stored)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            header = (weights.metadata() or {}).get(METHOD)
        if header != block.to_json():
            raise ValueError(
                f"load_checkpoint: the attention block in {file.name} differs from the one in the config of {folder}; the files "
                "come from different exports, or one was edited"
            )
    return block
