"""The folder of an export. Its manifest is checked against every file before a host library opens one.

Nothing is ever unpickled and no code of a folder is ever run: files that could do so are refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from qat_patch.layer import Shifts
from qat_patch.linear.packed import LinearRecord
from qat_patch.metadata import (
    CONFIG_KEYS,
    FORMAT_VERSION,
    AttentionMetadata,
    check_all_keys,
    check_format_version,
    in_config,
    without_entries,
)
from qat_patch.servers import AUTO_CONFIG, AUTO_ENABLE, SERVERS

from . import integrity
from .shifts import read_shifts
from .trust import allowed_keys, file_names
from .trust.file_names import MANIFEST, README, REFERENCE, REFERENCE_FOR_SERVERS, check_plain
from .trust.headers import check_weights, weight_files, weight_sizes
from .trust.plain_json import parse_json, read_json
from .trust.private_copy import PrivateCopy

_KINDS = ("model", "pipeline", "adapters")
_MANIFEST_KEYS = ["format_version", "package_version", "kind", "base_model", "attention", "references", "files"]
_OPTIONAL_KEYS = ["server", "linear"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFolder:
    """What a folder that `export_checkpoint` wrote says about itself, checked."""

    folder: Path
    kind: str
    """`model`, `pipeline` or `adapters`."""
    metadata: dict[str, AttentionMetadata]
    """By subfolder: one under "" for a model or adapters, one for each transformer of a pipeline."""
    base_model: str | None
    """For adapters: the model that they belong to."""
    server: str | None = None
    """The server that the export is for, if any. Then the manifest holds the metadata, and no config does."""
    linear: LinearRecord | None = None
    """The linear layers, if they are quantized too: packed in the export of a model; for adapters those of the base model."""
    references: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By subfolder, if recorded: the device, dtype and torch version that computed the reference output."""
    name: str = ""
    """While an export is loaded: the name that the user gave. `folder` is a private copy then."""

    @property
    def is_beside(self) -> bool:
        """Whether the metadata stand in the manifest, and not in the configs: those are for servers, or say what packed weights
        are."""
        return self.server is not None or self.linear is not None

    def host(self, part: str) -> str:
        """The host library of a model by subfolder."""
        if self.kind == "adapters":
            return "transformers" if (self.folder / "adapter_config.json").is_file() else "diffusers"
        return _host(read_json(self.folder / part / "config.json"))

    def reference(self, part: str) -> Path:
        """The file with the reference of a model by subfolder."""
        return self.folder / part / (REFERENCE_FOR_SERVERS if self.is_beside else REFERENCE)

    def shifts(self, part: str) -> Shifts:
        """The K and Q shifts of a model by subfolder; empty where it has none."""
        return read_shifts(self.metadata[part], lambda name: self.folder / part / name)


def write_manifest(export: ExportFolder) -> None:
    """Complete a folder. After this only the model card may change."""
    adapters = export.kind == "adapters"
    check_written(export)
    manifest = {
        "format_version": FORMAT_VERSION,
        "package_version": next(iter(export.metadata.values())).package_version,
        "kind": export.kind,
        "base_model": export.base_model,
        "attention": export.metadata[""].to_dict() if adapters else None,
        "references": export.references,
        "files": {name: record for name, record in integrity.fingerprints(export.folder).items() if name != README},
    }
    if export.server is not None:
        manifest["server"] = export.server
    if export.linear is not None:
        manifest["linear"] = export.linear.to_dict()
    if export.is_beside and not adapters:
        manifest["attention"] = {part: metadata.to_dict() for part, metadata in export.metadata.items()}
    (export.folder / MANIFEST).write_text(
        json.dumps(integrity.sealed(manifest), indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def read_folder(copy: PrivateCopy, name: str) -> ExportFolder:
    """Check an export, except the values of its weights, while it is copied to a private folder.

    Args:
        copy: its open files.
        name: the name that the user gave.

    Raises:
        ValueError: the folder is no export, of another format version, incomplete, changed or damaged; its parts do not
            belong together; or it holds something that could run code.
    """
    where = f"{copy.source / MANIFEST}"
    if MANIFEST not in copy.files:
        raise ValueError(f"load_checkpoint: {where} does not exist; {_no_export(copy)}")
    content = copy.read(MANIFEST)
    manifest = parse_json(where, content)
    if AttentionMetadata.is_ours(manifest):
        raise ValueError(
            f"load_checkpoint: {copy.source} was saved by save_pretrained and is no export; load it with its own library and "
            "call patch_model, which finds what was patched"
        )
    # The version comes first: another one may compute the hash in another way.
    check_format_version(where, manifest)
    try:
        manifest = integrity.unsealed(manifest)
    except ValueError as error:
        raise ValueError(f"load_checkpoint: {where} is damaged: {error}; get a fresh copy, or export again") from None
    for key in _OPTIONAL_KEYS:
        manifest.setdefault(key, None)
    check_all_keys(where, manifest, [*_MANIFEST_KEYS, *_OPTIONAL_KEYS])
    _check_manifest(where, manifest)
    linear = None if manifest["linear"] is None else LinearRecord.from_dict(manifest["linear"])
    kind, recorded = manifest["kind"], manifest["files"]
    index = parse_json("model_index.json", copy.read("model_index.json")) if "model_index.json" in copy.files else {}
    parts = [part for part, value in index.items() if isinstance(value, list) and part.isidentifier()]
    file_names.check_names(str(copy.source), copy.files, recorded, kind, parts)
    taken = copy.take([name for name in {*recorded, *file_names.MAY_COME_LATER} if name in copy.files])
    copy.put(MANIFEST, content)
    _check_configs(copy.folder, kind, manifest["server"], linear)
    if (changed := _what_changed(recorded, taken)) is not None:
        raise ValueError(f"load_checkpoint: {copy.source} {changed}; get a fresh copy, or export again")
    metadata = _check_parts(copy.folder, manifest)
    unknown = manifest["references"].keys() - metadata.keys()
    if unknown:
        raise ValueError(f"load_checkpoint: {where}: references: there is no model {min(unknown)!r}")
    return ExportFolder(
        folder=copy.folder,
        kind=kind,
        metadata=metadata,
        base_model=manifest["base_model"],
        server=manifest["server"],
        linear=linear,
        references=manifest["references"],
        name=name,
    )


def leave_out_unknown_keys(folder: Path, linear: LinearRecord | None = None) -> None:
    """Rewrite the configs of a folder without the keys that no library knows, which loading would refuse.

    Raises:
        ValueError: a config could run code.
    """
    for file in sorted(folder.rglob("*.json")):
        if file.name in allowed_keys.CONFIGS:
            config = read_json(file)
            known = {}
            if linear is not None and config.get(key := CONFIG_KEYS["transformers"]) == linear.quantization_config:
                known = {key: config.pop(key)}
            if (plain := allowed_keys.plain_config(str(file), file.name, config)) != config:
                file.write_text(json.dumps(plain | known, indent=2) + "\n", encoding="utf-8")


def check_written(export: ExportFolder) -> None:
    """Raise a ValueError if loading would refuse the names or configs of an export that was just written."""
    names = [file.relative_to(export.folder).as_posix() for file in export.folder.rglob("*") if not file.is_dir()]
    recorded = [name for name in names if name not in (MANIFEST, README)]
    parts = [folder.name for folder in export.folder.iterdir() if folder.is_dir()]
    file_names.check_names(str(export.folder), names, recorded, export.kind, parts)
    _check_configs(export.folder, export.kind, export.server, export.linear)


def _what_changed(recorded: dict[str, Any], taken: dict[str, tuple[int, str]]) -> str | None:
    """What is wrong with the copied files, or None if they are those that the manifest lists."""
    for name, record in recorded.items():
        if name not in taken:
            return f"is incomplete: {name} is missing"
        size, digest = taken[name]
        if size != record["bytes"]:
            return f"is damaged: {name} has {size} bytes and was written with {record['bytes']}"
        if digest != record["sha256"]:
            return f"is damaged: the content of {name} has changed since it was written"
    return None


def _check_parts(folder: Path, manifest: dict[str, Any]) -> dict[str, AttentionMetadata]:
    """The metadata of the models in a folder, after checking the headers of all weights and the sizes in the configs."""
    stored = _stored_metadata(folder, manifest)
    metadata = {part: _read_metadata(folder / part, values) for part, values in stored.items()}
    components = [each.name for each in folder.iterdir() if each.is_dir() and weight_files(each)]
    for part in sorted({*stored, *components, *([""] if weight_files(folder) else [])}):
        check_weights(folder / part, stored.get(part))
    for file in sorted(folder.rglob("*config.json")):
        if file.name in ("config.json", "scheduler_config.json"):
            allowed_keys.check_sizes(str(file), file.name, read_json(file), *weight_sizes(file.parent))
    return metadata


def _check_configs(folder: Path, kind: str, server: str | None, linear: LinearRecord | None) -> None:
    if (auto := folder / AUTO_CONFIG).is_file() and read_json(auto) != AUTO_ENABLE:
        raise ValueError(f"load_checkpoint: {auto}: expected what switches vLLM's KV cache on, and nothing else; remove it")
    for file in sorted(folder.rglob("*.json")):
        if file.name not in allowed_keys.CONFIGS:
            continue
        config = read_json(file)
        if kind == "model" and file == folder / "config.json":
            key = CONFIG_KEYS["transformers"]
            if linear is not None and config.pop(key, None) != linear.quantization_config:
                raise ValueError(
                    f"load_checkpoint: {file}: {key}: expected what {MANIFEST} says about the linear layers, as "
                    "compressed-tensors spells it; the files come from different exports, or one was edited"
                )
            if server is None:
                # The metadata is checked elsewhere.
                config = without_entries(_host(config), config)
        allowed_keys.check_config(str(file), file.name, config)


def _no_export(copy: PrivateCopy) -> str:
    if any(name in copy.files for name in ("config.json", "model_index.json")):
        return "it was not written by this version's export_checkpoint; load it with its own library and call patch_model"
    inside = sorted(name.removesuffix(f"/{MANIFEST}") for name in copy.files if name.endswith(f"/{MANIFEST}"))
    hint = f"; try {' or '.join(str(copy.source / name) for name in inside[:2])}" if inside else ""
    return f"expected a folder that export_checkpoint wrote{hint}"


def _check_manifest(where: str, manifest: dict[str, Any]) -> None:
    kind, base, recorded, references = (manifest[key] for key in ("kind", "base_model", "files", "references"))
    attention, server = manifest["attention"], manifest["server"]
    is_adapter, is_beside = kind == "adapters", server is not None or manifest["linear"] is not None
    is_by_part = isinstance(attention, dict) and bool(attention) and (kind == "pipeline" or attention.keys() == {""})
    for key, is_right, expected in (
        ("kind", isinstance(kind, str) and kind in _KINDS, " or ".join(_KINDS)),
        ("base_model", isinstance(base, str) if is_adapter else base is None, "a name for adapters, else null"),
        ("server", server is None or server in [*SERVERS], f"one of {', '.join(SERVERS)}, or none"),
        (
            "attention",
            is_adapter or (is_by_part if is_beside else attention is None),
            "metadata for adapters, by folder for a server or beside packed weights, else null",
        ),
        ("linear", kind != "pipeline" or manifest["linear"] is None, "null for a pipeline"),
        ("references", isinstance(references, dict), "a mapping"),
        ("files", isinstance(recorded, dict) and bool(recorded), "a mapping of files"),
    ):
        if not is_right:
            raise ValueError(f"load_checkpoint: {where}: {key}: expected {expected}, got {manifest[key]!r}")
    for name, record in recorded.items():
        check_all_keys(f"load_checkpoint: {where}: files", record, ["bytes", "sha256"])
        check_plain(where, name)
    for part, record in references.items():
        check_all_keys(f"load_checkpoint: {where}: references", record, ["device", "dtype", "torch"])
        if not all(isinstance(value, str) and re.fullmatch(r"[\w.+:-]{1,64}", value, re.ASCII) for value in record.values()):
            raise ValueError(f"load_checkpoint: {where}: references: expected short texts, got {record!r}")
        if str(Path(part, name := REFERENCE_FOR_SERVERS if is_beside else REFERENCE)) not in recorded:
            raise ValueError(f"load_checkpoint: {where}: references: {part!r} has no {name}")


def _stored_metadata(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The metadata in the configs, by subfolder."""
    if manifest["kind"] == "adapters":
        return {"": manifest["attention"]}
    if manifest["server"] is not None or manifest["linear"] is not None:
        for part in manifest["attention"]:
            if part and not (part.isidentifier() and (folder / part / "config.json").is_file()):
                raise ValueError(f"load_checkpoint: {folder / MANIFEST}: attention: there is no model {part!r}")
        return manifest["attention"]
    if manifest["kind"] == "model":
        config = read_json(folder / "config.json")
        return {"": in_config(_host(config), config)}
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"load_checkpoint: {folder} is an export of a pipeline and has no model_index.json; it is incomplete")
    stored = {file.parent.name: in_config("diffusers", read_json(file)) for file in sorted(folder.glob("*/config.json"))}
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
