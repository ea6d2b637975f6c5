"""Check an export from end to end: hashes, metadata, weights, and the loaded model's output for the reference input."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from qat_patch.layer import SHIFTS
from qat_patch.servers import SERVERS

from .golden_output import check_reference
from .load import load_part, load_pipeline
from .manifest import ExportFolder
from .trust.headers import weight_files
from .trust.opening import opened, printable, said_plainly
from .weights import FLOATS


def verify_checkpoint(folder: str | Path, *, revision: str | None = None) -> list[str]:
    """Check an export as far as possible without the original model.

    Every file must have its recorded hash; config, headers, index and shifts must belong together; every weight must be finite,
    and have the same shape and type in the loaded model as in the file; and the model must give the recorded output for the
    reference input. All on the CPU. `python -m qat_patch verify FOLDER` does this in its own process.

    Args:
        folder: what `export_checkpoint` wrote, or its name on the Hub.
        revision: branch, tag or commit on the Hub; default: main.

    Returns:
        The results, one line each.

    Raises:
        ValueError: something is wrong; the message says what.
    """
    with opened(folder, revision) as export, said_plainly(export.name, export.folder):
        return [printable(line) for line in _verified(export)]


def _verified(export: ExportFolder) -> list[str]:
    made_for = "" if export.server is None else f", for {SERVERS[export.server].name}"
    version = next(iter(export.metadata.values())).package_version
    report = [f"{export.name}: {export.kind}{made_for}, written by qat_patch {version}"]
    report.append("every file is as it was exported")
    files = sorted({file for path in (export.folder, *export.folder.iterdir()) if path.is_dir() for file in weight_files(path)})
    report.append(f"{sum(map(_check_finite, files))} weights in {len(files)} files are finite")
    pipeline = load_pipeline(export, "auto") if export.kind == "pipeline" else None
    for part, metadata in export.metadata.items():
        name = part or export.kind
        # Adapters alone may have been trained on a base of another type than it is stored in.
        trained_in = export.references[part]["dtype"] if export.kind == "adapters" and part in export.references else None
        dtype = next((x for x in FLOATS.values() if str(x) == f"torch.{trained_in}"), "auto")
        model = load_part(export, part, dtype) if pipeline is None else getattr(pipeline, part)
        if export.kind != "adapters":
            _check_shapes(export, part, model)
        shifts = " and ".join(f"{len(found)} with a {SHIFTS[which]}" for which, found in export.shifts(part).items())
        report.append(f"{name}: {len(metadata.modules)} modules patched as exported, of them {shifts}")
        if export.linear is not None:
            packed = "" if export.kind == "adapters" else ", packed as compressed-tensors reads them"
            report.append(f"{name}: {len(export.linear.scales)} linear layers in {export.linear.config.format}{packed}")
        if part not in export.references:
            report.append(f"{name}: no reference output was recorded; export_checkpoint(..., example_inputs=...) records one")
            continue
        how = export.references[part]
        for output, distance in check_reference(model, export.reference(part)).items():
            is_close = "bit-equal" if distance == 0 else f"within {distance:.1e} (relative L2)"
            report.append(f"{name}: {output} {is_close} to what was recorded on {how['device']} with torch {how['torch']}")
    return report


def _check_finite(file: Path) -> int:
    with safe_open(file, framework="pt") as weights:
        names = list(weights.keys())
        for name in names:
            x = weights.get_tensor(name)
            if x.dtype == torch.float8_e4m3fn:  # float8 scales of packed weights
                x = x.float()
            if not x.isfinite().all():
                count = int((~x.isfinite()).sum())
                raise ValueError(f"verify: {file}: {name} holds {count} values that are not finite, of {x.numel()}")
    return len(names)


def _check_shapes(export: ExportFolder, part: str, model: torch.nn.Module) -> None:
    # Names that transformers translates while it loads are checked by transformers.
    state = model.state_dict()
    for file in weight_files(export.folder / part):
        with safe_open(file, framework="pt") as weights:
            for name in state.keys() & set(weights.keys()):
                stored, loaded = weights.get_tensor(name), state[name]
                is_same = stored.shape == loaded.shape and torch.equal(stored.to(loaded.dtype), loaded)
                if not is_same or torch.finfo(loaded.dtype).bits < torch.finfo(stored.dtype).bits:
                    raise ValueError(
                        f"verify: {file}: {name} is {stored.dtype} {list(stored.shape)}, and in the loaded model it is "
                        f"{loaded.dtype} {list(loaded.shape)} of {'the same' if is_same else 'other'} values"
                    )
