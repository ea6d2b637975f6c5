"""Triton kernels on a CPU: one child process in which Triton's interpreter is on.

The interpreter has to be switched on before triton is imported, and it must stay off in the process of the tests, where
torch.compile and the ahead-of-time tests use the real compiler. Functions to call must be importable by name.
"""

import atexit
import functools
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

_SETTINGS = {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}  # numpy warns of every inf - inf


def interpreted(function: Callable, *args, **kwargs):
    """What `function` returns, computed by the child process; its exceptions are raised here."""
    return _child().submit(function, *args, **kwargs).result()


def on(device: str, function: Callable, *args, **kwargs):
    """`function` with `device="cuda"` in this process, or with `device="cpu"` under the interpreter."""
    if device == "cuda":
        return function(*args, device=device, **kwargs)
    return interpreted(function, *args, device=device, **kwargs)


@functools.cache
def _child() -> ProcessPoolExecutor:
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update(_SETTINGS)
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # the process starts with the first task
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    atexit.register(pool.shutdown)
    return pool
