"""SageAttention3's own kernel for the preset `sage3`, where it is installed: found, loaded, and called as it wants to be called.

Two ways to install it: the package `sageattn3`, built from its sources; and the library `kernels` with the build that diffusers'
backend `sage_blackwell_hub` has put into the Hub's cache. Nothing is ever downloaded here. Either needs triton, which is imported
where a device is looked at, so that this module says what is installed without it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from .mask import Mask
from .spec import QuantSpec
from .varlen import Packing

REPOSITORY, VERSION = "SageAttention/sage-blackwell", 1
"""On the Hub, as diffusers 0.42 has it."""
_OLDEST_KERNELS = (0, 17)
_EXTENSIONS = ("fp4attn_cuda", "fp4quant_cuda")
"""Modules of the package `sageattn3` that stand beside it."""
_DTYPES = (torch.bfloat16, torch.float16)
_FP4_ARCH = 100


class Installed(NamedTuple):
    """Where SageAttention3 is."""

    name: str
    """For people."""
    files: tuple[Path, ...]
    """All of it."""
    on_the_hub: bool
    """Whether the library `kernels` loads it."""

    @property
    def fingerprint(self) -> str:
        """What changes when it is built or downloaded again: a verdict depends on it."""
        stats = [(path.name, (found := path.stat()).st_size, found.st_mtime_ns) for path in self.files]
        return f"{self.name} {hashlib.sha256(repr(stats).encode()).hexdigest()}"

    def load(self) -> Callable[..., torch.Tensor]:
        """Import it.

        Raises:
            ValueError: the import fails; says why.
        """
        try:
            if not self.on_the_hub:
                from sageattn3 import sageattn3_blackwell

                return sageattn3_blackwell
            from kernels import get_local_kernel, install_kernel

            return get_local_kernel(install_kernel(REPOSITORY, version=VERSION, local_files_only=True)).sageattn3_blackwell
        except Exception as error:
            raise ValueError(
                f"attention: impl='sageattn3': {self.name} cannot be loaded: {type(error).__name__}: {error}; install it again, "
                "or use impl='triton'"
            ) from error


def installed() -> Installed | None:
    """SageAttention3, if it is there. Nothing of it is imported."""
    if (package := find_spec("sageattn3")) is not None and package.origin is not None:
        beside = [spec.origin for name in _EXTENSIONS if (spec := find_spec(name)) is not None and spec.origin is not None]
        name = f"sageattn3 {_version('sageattn3') or '(of an unknown version)'}"
        return Installed(name, (*_files(Path(package.origin).parent), *map(Path, beside)), False)
    library = re.match(r"(\d+)\.(\d+)", _version("kernels") or "0.0")
    if library is None or tuple(map(int, library.groups())) < _OLDEST_KERNELS:
        return None
    return next((Installed(f"{REPOSITORY} {folder.name[:12]}", _files(folder), True) for folder in _snapshots()), None)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why it cannot run on a GPU on which Triton's kernels can, or None."""
    from .triton.device import arch_of

    if (arch := arch_of(device)) < _FP4_ARCH:
        return f"sm_{arch} has no FP4 units (sm_100 and sm_120 have)"
    if dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, got {str(dtype).removeprefix('torch.')}"
    if installed() is None:
        return (
            "SageAttention3 is not installed: expected the package sageattn3, or the library kernels (0.17 or later) with "
            f"{REPOSITORY} in the Hub's cache, where set_attention_backend('sage_blackwell_hub') of diffusers puts it"
        )
    return None


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    k_shift: torch.Tensor | None,
    packing: Packing | None = None,
    *,
    spec: QuantSpec,
    mask: Mask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O in the shape, strides and dtype of `query`, and NaN in place of LSE, float32 [B, H, Lq], which it does not return.

    Args:
        query, key, value: [B, H, L, D], as many key heads as query heads.
        key_mask, k_shift, packing, mask, scale: nothing that the preset `sage3` refuses; `attention` has seen to that.

    Raises:
        ValueError: it cannot run here; says why.
    """
    from .triton.device import on_device

    assert key_mask is None and k_shift is None and packing is None and mask == Mask() and scale == query.shape[-1] ** -0.5
    lse = query.new_full(query.shape[:3], torch.nan, dtype=torch.float32)
    function = _loaded(query.device, query.dtype)
    out = torch.empty_like(query)
    if not query.numel() or not key.numel():
        return out.zero_(), lse
    with on_device(query.device):
        # It subtracts the mean from the keys that it is given, in place.
        key = key.clone(memory_format=torch.contiguous_format)
        return out.copy_(function(query.contiguous(), key, value.contiguous(), is_causal=False)), lse


@lru_cache
def _loaded(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    from .triton.device import check_device

    check_device(device)
    problem, found = why_not(device, dtype), installed()
    if problem is not None or found is None:
        raise ValueError(f"attention: impl='sageattn3': {problem}; use impl='triton' or 'eager'")
    return found.load()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _files(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"))


def _snapshots() -> list[Path]:
    """Of the version on the Hub that is wanted: the folders in the Hub's cache that hold a build."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        return []
    found = []
    for kind in ("kernels", "models"):  # huggingface_hub called repositories of kernels models before
        folder = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE) / f"{kind}--{REPOSITORY.replace('/', '--')}"
        reference = folder / "refs" / f"v{VERSION}"
        if reference.is_file():
            found.append(folder / "snapshots" / reference.read_text(encoding="utf-8").strip())
    return [folder for folder in found if (folder / "build").is_dir()]
