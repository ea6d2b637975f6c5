"""A GPU with FP4 units that is not there: the CPU takes its place, and stubs that compute the definition its kernels."""

import contextlib
import json
import sys
from types import SimpleNamespace
from unittest import mock

import torch

from qat_kernels import QuantSpec, reference, varlen
from qat_patch.self_check import child

CPU = torch.device("cpu")
IDENTITY = {
    "gpu": "Fake 5090",
    "architecture": "sm_120",
    "driver": "1",
    "torch": "2",
    "triton": "3",
    "compiler": "c",
    "kernels": "k",
}


def definition(
    q, k, v, key_mask, k_shift, packing=None, *, spec, mask, scale, q_shift=None, bounds=None, softcap=None, sinks=None, **_
):
    """O and LSE, as every launcher returns them first."""
    options = {"spec": spec, "mask": mask, "scale": scale, "with_out_hp": False, "softcap": softcap, "sinks": sinks}
    if packing is None:
        out, _, lse = reference.forward(q, k, v, key_mask, k_shift, q_shift, bounds=bounds, **options)
    else:
        out, _, lse = varlen.forward(q, k, v, k_shift, q_shift, packing, **options)
    return out, lse


def as_training(*args, **kwargs):
    """The same as the training kernels return it."""
    out, lse = definition(*args, **kwargs)
    return out, out.new_empty(0), lse, lse.new_empty(0), out.new_empty(0, dtype=torch.uint8)


@contextlib.contextmanager
def fake_gpu(arch=120, identities=None):
    """Inside, the CPU is a GPU of this architecture; `identities` are those of several, which all are the CPU."""
    known = [IDENTITY | {"architecture": f"sm_{arch}"}] if identities is None else identities
    queue = list(known)

    def identity(device):
        queue.append(queue.pop(0))
        return queue[-1]

    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch("qat_kernels.triton.launch.check_device", lambda device: None),
            mock.patch("qat_kernels.fp4.launch.arch_of", lambda device: arch),
            mock.patch("qat_kernels.triton.device.check_device", lambda device: None),
            mock.patch("qat_kernels.triton.device.arch_of", lambda device: arch),
            mock.patch("qat_kernels.fp4.launch.TRITON", (3, 9)),
            mock.patch("qat_kernels.dispatch.resolve", lambda *_, **__: "triton"),
            mock.patch("qat_kernels.api.resolve", lambda *_, **__: "triton"),
            # The decode kernels cannot be faked: steps over the cache stay eager, the first call goes where it would.
            mock.patch("qat_kernels.decode.cache.without_verdicts", lambda *_: "eager"),
            mock.patch("qat_kernels.ops.fp4_kernels", lambda: SimpleNamespace(forward=definition)),
            mock.patch(
                "qat_kernels.ops.training_kernels",
                lambda: SimpleNamespace(forward=as_training, output_shapes=lambda *_, **__: ((0,), (0,))),
            ),
            mock.patch("qat_kernels.self_check.identity.identity", identity),
            # Those that import it first: a module that is imported here for the first time would keep the stand-in.
            mock.patch("qat_patch.implementation.gpus", lambda: [CPU] * len(known)),
            mock.patch("qat_patch.measure.doctor.gpus", lambda: [CPU] * len(known)),
            mock.patch("qat_patch.self_check.check.gpus", lambda: [CPU] * len(known)),
        ):
            stack.enter_context(patch)
        yield


def times(ratio=2.0, lengths=(16, 64)):
    """What a child measured: triton takes `ratio` times as long as the kernel."""
    return [{"queries": a, "keys": b, "kernel": 1.0, "triton": ratio, "sdpa": 3.0} for a in lengths for b in lengths]


def passed(wins_from=(16, 16), **more):
    """A result of the child, without its case."""
    wins_from = None if wins_from is None else list(wins_from)
    result = {"state": "passed", "reason": None, "emulated": None, "error": 1e-3, "times": times(2.0 if wins_from else 0.5)}
    return result | {"wins_from": wins_from, "identity": IDENTITY} | more


def says(monkeypatch, result=None, code=""):
    """Let the child say this of every case, or run other code in place of its loop; it starts without torch, at once."""
    text = f"""
import json, os, signal, sys, time
request = json.loads(sys.argv[1])
def say(case, result): print(json.dumps({{"case": case}} | result), flush=True)
result = json.loads({json.dumps(result)!r})
{code or 'for case in request["cases"]: say(case, result)'}
"""
    monkeypatch.setattr(child, "COMMAND", (sys.executable, "-S", "-c", text))


SPEC = QuantSpec().to_json()
