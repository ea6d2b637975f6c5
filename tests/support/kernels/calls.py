"""What patched models hand to 4-bit attention, call by call."""

from qat_kernels import attention
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from qat_patch.hosts.transformers import attention as transformers_attention


def record_calls(monkeypatch):
    """A list to which every call, of either host library, adds its arguments by name; undone with `monkeypatch`."""
    seen = []

    def spy(q, k, v, **kwargs):
        seen.append(kwargs | {"q": q, "k": k, "v": v})
        return attention(q, k, v, **kwargs)

    for adapter in (diffusers_adapter, transformers_attention):
        monkeypatch.setattr(adapter, "attention", spy)
    return seen
