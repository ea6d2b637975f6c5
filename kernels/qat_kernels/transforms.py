"""Whether derivatives are taken in a way that a tensor does not show: `torch.func` and forward mode."""

from __future__ import annotations

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a derivative of `torch.func` or of forward mode is being taken. Compiled code is guarded by both."""
    return _under_torch_func() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _under_torch_func() -> bool:
    stack = get_interpreter_stack()
    return stack is not None and any(each.key() != TransformType.Vmap for each in stack)
