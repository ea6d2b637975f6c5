"""SageAttention3 that is not there: a package of the same signature, and a self-check that is done with it on a CPU."""

import contextlib
import sys
from types import SimpleNamespace
from unittest import mock

from qat_kernels import sageattn3
from qat_kernels.self_check import problems, timing
from support.kernels.fake_gpu import as_training
from support.kernels.sage_server import attend

PACKAGE = """
import os, signal
import torch
from support.kernels.fake_sage import sageattn3_blackwell as right

def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    {code}
    return right(q, k, v, attn_mask, is_causal, per_block_mean, **kwargs)
"""


def sageattn3_blackwell(q, k, v, attn_mask=None, is_causal=False, per_block_mean=True, **kwargs):
    """As the package has it: contiguous [B, H, L, D] in 16 bits, whose K it centres in place; a new tensor comes back."""
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and q.element_size() == 2 and not kwargs
    assert q.shape[1] == k.shape[1] and q.shape[-1] in (64, 128) and attn_mask is None and not is_causal and per_block_mean
    out = q.new_empty(q.shape)
    out.copy_(attend(q, k, v))
    k -= k.mean(dim=-2, keepdim=True)
    return out


def install(folder, code="", version="1.0.0"):
    """Write the package, as pip leaves it, into a folder; `code` runs before each call."""
    for file, text in (
        ("sageattn3/__init__.py", PACKAGE.format(code=code or "pass")),
        (f"sageattn3-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: sageattn3\nVersion: {version}\n"),
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)


@contextlib.contextmanager
def fresh():
    """Inside, SageAttention3 is loaded again."""

    def forget():
        sageattn3._loaded.cache_clear()
        sys.modules.pop("sageattn3", None)

    forget()
    yield
    forget()


@contextlib.contextmanager
def small_check(names=None):
    """Inside, a check takes seconds: small problems, of these names only if there are any, on a CPU in place of Triton."""
    every, measure = problems.problems, timing.measure

    def small(case, device, tensors):
        made = every(case, device, tensors=tensors, long=300, largest=(2, 2, 150, case.head_dim))
        return (each for each in made if names is None or each.name in names)

    def training(*args, **options):
        out, _, lse, *_ = as_training(*args, **options)
        return SimpleNamespace(out=out, lse=lse)

    with (
        mock.patch.object(problems, "problems", small),
        mock.patch.object(timing, "measure", lambda *args: measure(*args, lengths=(16,))),
        mock.patch.object(timing, "_HEADS", 1),
        mock.patch.object(timing, "_ROUNDS", 1),
        mock.patch("qat_kernels.triton.launch.forward", training),
    ):
        yield
