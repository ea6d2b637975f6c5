"""The host libraries: their adapters by name."""

from .base import HostAdapter
from .diffusers import adapter as diffusers_adapter
from .transformers import adapter as transformers_adapter

ADAPTERS: dict[str, HostAdapter] = {"transformers": transformers_adapter, "diffusers": diffusers_adapter}
