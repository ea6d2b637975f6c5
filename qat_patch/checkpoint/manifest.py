"""The folder of an export: what its manifest says is checked against every file before a host library opens one.

Nothing is ever unpickled and no code of a folder is ever run: whatever could lead there is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qat_patch.metadata import CONFIG_KEYS, FORMAT_VERSION, METHOD, AttentionMetadata, check_all_keys, check_format_version

from . import integrity
from .k_shift import K_SHIFT, read_k_shift, readable

MANIFEST = "qat_patch.json"
"""Written last: what kind of export this is, and size and SHA-256 of every file that loading may read."""
REFERENCE = "qat_patch_reference.safetensors"
"""Beside the weights of a model: an input, and what the exported model makes of it; see reference.py."""
_BESIDE = {K_SHIFT, REFERENCE}
_KINDS = ("model", "pipeline", "adapters")
# What a host library might open; other files, such as pictures of a model card, may be added to an export.
_READABLE = {".json", ".safetensors", ".gguf", ".msgpack", ".h5", ".model", ".jinja"}
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# In a config these make a host library run code from elsewhere.
_HOSTILE_KEYS = {"auto_map", "attn_implementation", "_attn_implementation", "custom_pipelines", "custom_generate"}
_MANIFEST_KEYS = ["format_version", "package_version", "kind", "base_model", "attention", "references", "files"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFolder:
    """What a folder that `export_checkpoint` wrote says about itself, checked."""

    folder: Path
    kind: str
    """`model`, `pipeline` or `adapters`."""
    metadata: dict[str, AttentionMetadata]
    """By subfolder: one under "" for a model or adapters, one a transformer for a pipeline."""
    base_model: str | None
    """Of adapters: what they belong to."""
    references: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By subfolder, where one was recorded: device, dtype and torch version that computed the reference output."""

    def host(self, part: str) -> str:
        """The host library of a model by subfolder."""
        if self.kind == "adapters":
            return "transformers" if (self.folder / "adapter_config.json").is_file() else "diffusers"
        return _host(read_json(self.folder / part / "config.json"))

    def k_shift(self, part: str) -> dict[str, torch.Tensor]:
        """The K shifts of a model by subfolder: module name -> float32 [key heads, head dim]; empty if it has none."""
        metadata = self.metadata[part]
        return {} if metadata.k_shift is None else read_k_shift(self.folder / part / K_SHIFT, metadata)


def write_manifest(export: ExportFolder) -> None:
    """Complete a folder: nothing but the model card may change in it any more."""
    adapters = export.kind == "adapters"
    manifest = {
        "format_version": FORMAT_VERSION,
        "package_version": next(iter(export.metadata.values())).package_version,
        "kind": export.kind,
        "base_model": export.base_model,
        "attention": export.metadata[""].to_dict() if adapters else None,
        "references": export.references,
        "files": {name: record for name, record in integrity.fingerprints(export.folder).items() if name != "README.md"},
    }
    (export.folder / MANIFEST).write_text(
        json.dumps(integrity.sealed(manifest), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def read_folder(folder: str | Path) -> ExportFolder:
    """Read and check an export, all of it but the values of its weights.

    Raises:
        ValueError: the folder is no export, of another format version, incomplete, changed or damaged; its parts do not
            belong together; or it holds something that could run code.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST, _no_export(folder))
    # The version comes first: another one may seal in another way.
    check_format_version(f"{folder / MANIFEST}", manifest)
    try:
        manifest = integrity.unsealed(manifest)
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {folder / MANIFEST} is damaged: {error}; get a fresh copy, or export again") from None
    check_all_keys(f"{folder / MANIFEST}", manifest, _MANIFEST_KEYS)
    _check_manifest(folder, manifest)
    _check_names(folder, manifest)
    if changed := integrity.what_changed(folder, manifest["files"]):
        raise ValueError(f"load_checkpoint: {folder} {changed}; get a fresh copy, or export again")
    kind = manifest["kind"]
    metadata = {}
    for part, stored in _stored_metadata(folder, manifest).items():
        metadata[part] = _read_metadata(folder / part, stored)
        _check_weights(folder / part, stored)
    unknown = manifest["references"].keys() - metadata.keys()
    if unknown:
        raise ValueError(f"load_checkpoint: {folder / MANIFEST}: references: there is no model {min(unknown)!r}")
    return ExportFolder(
        folder=folder, kind=kind, metadata=metadata, base_model=manifest["base_model"], references=manifest["references"]
    )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model, without those that this package puts beside them."""
    return sorted(file for file in folder.glob("*.safetensors") if file.name not in _BESIDE)


def read_json(file: Path, missing: str = "the export is incomplete") -> dict[str, Any]:
    """A JSON object of an export.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise ValueError(f"load_checkpoint: {file} does not exist; {missing}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_checkpoint: {file} is not JSON ({error}); the export is damaged") from error
    if not isinstance(content, dict):
        raise ValueError(f"load_checkpoint: {file}: expected a JSON object, got {type(content).__name__}; the export is damaged")
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a key occurs twice")
    return content


def _no_export(folder: Path) -> str:
    if any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        return "it was not written by this version's export_checkpoint; load it with its own library and call patch_model"
    return "expected a folder that export_checkpoint wrote"


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    kind, base, recorded, references = (manifest[key] for key in ("kind", "base_model", "files", "references"))
    is_adapter = kind == "adapters"
    for key, is_right, expected in (
        ("kind", kind in _KINDS, " or ".join(_KINDS)),
        ("base_model", isinstance(base, str) if is_adapter else base is None, "a name for adapters, else null"),
        ("attention", is_adapter or manifest["attention"] is None, "metadata for adapters, else null"),
        ("references", isinstance(references, dict), "a mapping"),
        ("files", isinstance(recorded, dict) and bool(recorded), "a mapping of files"),
    ):
        if not is_right:
            raise ValueError(f"load_checkpoint: {folder / MANIFEST}: {key}: expected {expected}, got {manifest[key]!r}")
    for name, record in recorded.items():
        check_all_keys(f"load_checkpoint: {folder / MANIFEST}: files", record, ["bytes", "sha256"])
        _check_file_name(folder / MANIFEST, name)
    for part, record in references.items():
        check_all_keys(f"load_checkpoint: {folder / MANIFEST}: references", record, ["device", "dtype", "torch"])
        if not all(isinstance(value, str) for value in record.values()):
            raise ValueError(f"load_checkpoint: {folder / MANIFEST}: references: expected texts, got {record!r}")
        if str(Path(part, REFERENCE)) not in recorded:
            raise ValueError(f"load_checkpoint: {folder / MANIFEST}: references: {part!r} has no {REFERENCE}")


def _check_file_name(where: Path, name: Any) -> None:
    """File names from inside a file: in the folder, plainly."""
    if not isinstance(name, str) or not re.fullmatch(r"(?:\w[\w.+-]*/)*\w[\w.+-]*", name):
        raise ValueError(
            f"load_checkpoint: {where}: expected names of files in the folder, without .. and the like, got {name!r}; the export "
            "is damaged, or hostile"
        )


def _check_names(folder: Path, manifest: dict[str, Any]) -> None:
    """Nothing but what was exported lies where a host library might find it."""
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.suffix.lower() in _PICKLES or file.suffix == ".py":
            raise ValueError(
                f"load_checkpoint: {folder} holds {name}, which could run code, and no export does; remove it, or get the folder "
                "from someone you trust"
            )
        if file.suffix.lower() in _READABLE and name not in manifest["files"] and name != MANIFEST:
            raise ValueError(
                f"load_checkpoint: {folder} holds {name}, which was not there when it was exported; remove it, or export again"
            )
    if manifest["kind"] != "adapters" and (folder / "adapter_config.json").exists():
        raise ValueError(f"load_checkpoint: {folder} is an export of a {manifest['kind']} and holds adapters too; remove them")
    for file in sorted(folder.rglob("*.json")):
        if file.name in ("config.json", "model_index.json", "adapter_config.json", "generation_config.json"):
            _check_config(file)


def _check_config(file: Path) -> None:
    config = read_json(file)
    stack: list[Any] = [{key: value for key, value in config.items() if key not in CONFIG_KEYS.values()}]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            if found := sorted(_HOSTILE_KEYS & value.keys()):
                raise ValueError(
                    f"load_checkpoint: {file} sets {found[0]!r}, which could run code from elsewhere, and no export does; remove "
                    "it, or get the folder from someone you trust"
                )
            stack += value.values()
        elif isinstance(value, list):
            stack += value
    if file.name != "model_index.json":
        return
    for name, value in config.items():
        is_right = isinstance(value, str) if name == "_class_name" else not isinstance(value, list) or _is_component(value)
        if not is_right:
            raise ValueError(
                f"load_checkpoint: {file}: {name}: expected a class of diffusers or transformers, got {value!r}; nothing "
                "else is loaded"
            )


def _is_component(value: list[Any]) -> bool:
    return value == [None, None] or (
        len(value) == 2 and value[0] in ("diffusers", "transformers") and isinstance(value[1], str) and value[1].isidentifier()
    )


def _stored_metadata(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The metadata as they stand in the configs, by subfolder."""
    if manifest["kind"] == "adapters":
        return {"": manifest["attention"]}
    if manifest["kind"] == "model":
        config = read_json(folder / "config.json")
        return {"": config.get(CONFIG_KEYS[_host(config)])}
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"load_checkpoint: {folder} is an export of a pipeline and has no model_index.json; it is incomplete")
    stored = {file.parent.name: read_json(file).get(CONFIG_KEYS["diffusers"]) for file in sorted(folder.glob("*/config.json"))}
    metadata = {name: values for name, values in stored.items() if values is not None}
    if not metadata:
        raise ValueError(f"load_checkpoint: no model in {folder} has attention metadata of qat_patch; the export is damaged")
    return metadata


def _host(config: dict[str, Any]) -> str:
    return "diffusers" if "_class_name" in config else "transformers"


def _read_metadata(folder: Path, stored: Any) -> AttentionMetadata:
    if not AttentionMetadata.is_ours(stored):
        raise ValueError(
            f"load_checkpoint: the config in {folder} has no attention metadata of qat_patch (got {stored!r}); the export is "
            "damaged"
        )
    return AttentionMetadata.from_dict(stored)


def _check_weights(folder: Path, metadata: dict[str, Any]) -> None:
    """The headers of the weights hold the metadata of the config, and their index, if there is one, tells the truth."""
    weights = weight_files(folder)
    if not weights:
        raise ValueError(f"load_checkpoint: there are no safetensors weights in {folder}; the export is incomplete")
    place: dict[str, str] = {}
    for file in weights:
        header, names = readable(file, functools.partial(_read_header, file))
        if header != metadata:
            raise ValueError(
                f"load_checkpoint: the attention metadata in {file.name} differs from the one in the config of {folder}; the "
                "files come from different exports, or one was edited"
            )
        place |= dict.fromkeys(names, file.name)
    indices = sorted(folder.glob("*.index.json"))
    if len(weights) > 1 and len(indices) != 1:
        raise ValueError(
            f"load_checkpoint: {folder} holds {len(weights)} files of weights and {len(indices)} indices; expected one"
        )
    for file in indices:
        weight_map = read_json(file).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(
                f"load_checkpoint: {file}: weight_map: expected a mapping, got {weight_map!r}; the export is damaged"
            )
        for name in weight_map.values():
            _check_file_name(file, name)
        if weight_map != place:
            wrong = sorted(name for name in {*weight_map, *place} if weight_map.get(name) != place.get(name))
            raise ValueError(
                f"load_checkpoint: {file}: says that {wrong[0]} is in {weight_map.get(wrong[0])}, and it is in "
                f"{place.get(wrong[0])}; the export is damaged"
            )


def _read_header(file: Path) -> tuple[Any, list[str]]:
    with safe_open(file, framework="pt") as weights:
        return json.loads((weights.metadata() or {}).get(METHOD, "null")), list(weights.keys())
