"""What a verdict of the self-check depends on: GPU, driver, torch, Triton as it compiles, and the kernels."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import triton_key

from qat_kernels import sageattn3
from qat_kernels.spec import InferenceKernel
from qat_kernels.triton.device import arch_of

try:
    from triton._C.libtriton import get_cache_invalidating_env_vars
except ImportError:  # a Triton that keeps it elsewhere: its version and source are in the key all the same

    def get_cache_invalidating_env_vars() -> dict[str, str]:
        """Nothing known."""
        return {}


_DRIVER = Path("/proc/driver/nvidia/version")


def identity(device: torch.device) -> dict[str, str]:
    """Name and value of everything that every verdict on this device depends on. Two GPUs of one kind have the same.

    Raises:
        RuntimeError: there is no such GPU, or this process cannot use it.
    """
    arch = arch_of(device)
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "architecture": f"sm_{arch}",
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "compiler": _compiler(arch),
        "kernels": _source(),
    }


def of_kernel(kernel: InferenceKernel | None) -> dict[str, str]:
    """What a verdict on a kernel of others depends on besides."""
    if kernel != "sageattn3":
        return {}
    found = sageattn3.installed()
    return {kernel: found.fingerprint if found is not None else "not installed"}


@lru_cache
def _driver() -> str:
    """The version of the kernel module, and of the CUDA that it brings; what there is of them."""
    cuda = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
    lines = _DRIVER.read_text(encoding="utf-8", errors="replace").splitlines() if _DRIVER.is_file() else [""]
    return f"{lines[0].strip()} CUDA {cuda}".strip()


@lru_cache
def _compiler(arch: int) -> str:
    """A hash of what Triton's own cache asks for beside the source of a kernel: Triton's files, ptxas, and settings."""
    settings = sorted(get_cache_invalidating_env_vars().items())
    return _hash(f"{triton_key()}-{make_backend(GPUTarget('cuda', arch, 32)).hash()}-{settings}".encode())


@lru_cache
def _source() -> str:
    """A hash of every file of this package."""
    root = Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    return _hash(b"".join(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0" for path in files))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
