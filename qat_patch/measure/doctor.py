"""The machine, the versions, and what runs how: what `qat-patch doctor` prints."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch

from qat_kernels import NVFP4, QuantSpec, explain
from qat_kernels.dispatch import why_not
from qat_kernels.verdicts import Case
from qat_patch.self_check.check import NOT_CHECKED, CheckReport, check, gpus, known_verdicts, unchecked
from qat_patch.version import __version__
from qat_patch.versions import SUPPORTED, is_supported

HEAD_DIM = 128
SAGE3 = QuantSpec(preset="sage3")
CASES = (
    *(Case(head_dim, causal, NVFP4.to_json(), torch.bfloat16) for head_dim in (128, 64) for causal in (False, True)),
    *(Case(head_dim, False, SAGE3.to_json(), torch.bfloat16) for head_dim in (128, 64)),
)
"""The calls of most models, and with `sage3` if SageAttention3 is installed; `handle.check()` checks a model's own calls."""

NO_GPU = (
    "PyTorch finds no GPU. 4-bit attention runs here, with the same numbers, but slowly.\n"
    "For an NVIDIA GPU install a PyTorch with CUDA and a driver."
)


def report() -> str:
    """The report, with a few lines for each device."""
    lines = [f"{'machine':12} {platform.system()} {platform.machine()}, Python {platform.python_version()}"]
    lines.append(f"{'qat-patch':12} {__version__}")
    lines += [f"{name:12} {_version(name)}" for name in (*SUPPORTED, "triton")]
    devices, verdicts = [torch.device("cpu"), *gpus()], known_verdicts()
    for device in devices:
        lines += ["", f"{device}: {_describe(device)}"]
        q = torch.empty(1, 2, 16, HEAD_DIM, dtype=torch.bfloat16, device=device)
        calls = [("training", NVFP4, True), ("inference", NVFP4, False)]
        if why_not("sageattn3", device, q.dtype, SAGE3, False) is None:
            calls.append(("inference with SageAttention3", SAGE3, False))
        for what, spec, needs_gradient in calls:
            lines.append(f"  {what} (bfloat16, head_dim {HEAD_DIM})")
            words = explain(q, q, q, spec=spec, impl=verdicts or "auto", needs_gradient=needs_gradient)
            lines += [f"    {line}" for line in words.splitlines()]
        if unchecked(verdicts, device, CASES):
            lines.append(f"  {NOT_CHECKED}")
        kernels = device.type == "cuda" and why_not("triton", device, q.dtype, NVFP4, False) is None
        lines += ["  generation with handle.cache()", f"    {'decode kernels of its own' if kernels else 'eager, in PyTorch'}"]
    if len(devices) == 1:
        lines += ["", NO_GPU]
    return "\n".join(lines)


def self_check() -> CheckReport:
    """Check the calls of most models on every GPU, and save the verdicts.

    Raises:
        ValueError: no GPU can run the kernels.
    """
    return check(gpus(), CASES)


def _version(name: str) -> str:
    """The version of the imported package: pip's metadata may lack a part (`2.13.0+cpu`)."""
    if importlib.util.find_spec(name) is None:
        return "not installed"
    try:
        found = str(_imported(name).__version__)
    except Exception as error:  # the report must not stop at a broken package
        return f"BROKEN: the import fails with {type(error).__name__}: {error}"
    return found if is_supported(name, found) else f"{found}  NOT SUPPORTED: expected {','.join(SUPPORTED[name])}"


def _imported(name: str) -> Any:
    match name:
        case "accelerate":
            import accelerate as package
        case "diffusers":
            import diffusers as package
        case "peft":
            import peft as package
        case "transformers":
            import transformers as package
        case "triton":
            import triton as package
        case _:
            package = torch
    return package


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
