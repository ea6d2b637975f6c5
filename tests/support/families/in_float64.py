"""Stock models in float64, also where their code asks for float32: norms, softmax, rotary embeddings, routers.

Otherwise a difference in the last bit of float64 becomes one of float32, and a model that is right to 1e-9 cannot be told from
one that is right to 1e-6.
"""

import sys

import torch
from torch.overrides import TorchFunctionMode


class InFloat64(TorchFunctionMode):
    """Inside, float32 is float64 in the code of Transformers, and in no other code."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        frame = sys._getframe(1)
        while frame.f_back is not None and _module(frame).startswith("torch."):  # functions of torch that call others of torch
            frame = frame.f_back
        if _module(frame).startswith("transformers."):
            if func is torch.Tensor.float:
                func = torch.Tensor.double
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return func(*args, **kwargs)


def _module(frame):
    return frame.f_globals.get("__name__", "")
