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
    if (folder / "model_index.json").is_file():
        model = _load_pipeline(folder, dtype)
    elif (folder / ADAPTER_FILE).is_file():
        model = _load_adapters(folder, dtype)
    else:
        model = _load_model(folder, dtype)
    return model if device is None else model.to(device)


def _load_model(folder: Path, dtype: torch.dtype | str) -> torch.nn.Module:
    config = _read_json(folder / "config.json")
    host = "diffusers" if "_class_name" in config else "transformers"
    block = _checked_block(folder, config.get(CONFIG_KEYS[host]))
    if host == "diffusers":
        from diffusers import AutoModel

        model = AutoModel.from_pretrained(folder, local_files_only=True, **_torch_dtype(dtype))
        patch_model(model, block.config)
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)  # our quantizer patches it
    block.check_modules(list(get_handle(model).patched))
    return model.eval()


def _load_pipeline(folder: Path, dtype: torch.dtype | str) -> Any:
    blocks = {}
    for file in sorted(folder.glob("*/config.json")):
        if AttentionBlock.is_ours(stored := _read_json(file).get(CONFIG_KEYS["diffusers"])):
            blocks[file.parent.name] = _checked_block(file.parent, stored)
    if not blocks:
        raise ValueError(
            f"load_checkpoint: no model in {folder} has an attention block of qat_patch; load it with diffusers and call "
            "patch_model"
        )
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, **_torch_dtype(dtype))
    for name, block in blocks.items():
        block.check_modules(list(patch_model(getattr(pipeline, name), block.config).patched))
    return pipeline


def _load_adapters(folder: Path, dtype: torch.dtype | str) -> torch.nn.Module:
    content = _read_json(folder / ADAPTER_FILE)
    block = _checked_block(folder, content.get("attention"))
    base = content["base_model"]
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        patch_model(model, block.config)
        model = PeftModel.from_pretrained(model, folder)
    else:
        from diffusers import AutoModel

        subfolder = {"subfolder": "transformer"} if not (Path(base) / "config.json").is_file() else {}
        model = AutoModel.from_pretrained(base, **subfolder, **_torch_dtype(dtype))
        patch_model(model, block.config)
        model.load_lora_adapter(folder, prefix=None)
    block.check_modules(list(get_handle(model).patched))
    return model.eval()


def _torch_dtype(dtype: torch.dtype | str) -> dict[str, Any]:
    """diffusers has no "auto"; without the argument it loads float32."""
    return {} if dtype == "auto" else {"torch_dtype": dtype}


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
