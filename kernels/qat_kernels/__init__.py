"""NVFP4 attention that can be trained. Knows tensors only; imports torch and nothing of any model library."""

from qat_kernels.decode.cache import KVCache

from .api import attention
from .dispatch import explain
from .nvfp4 import Quantized, dequantize, fake_quantize, pack, quantize, unpack
from .spec import NVFP4, QuantSpec

__all__ = [
    "NVFP4",
    "KVCache",
    "QuantSpec",
    "Quantized",
    "attention",
    "dequantize",
    "explain",
    "fake_quantize",
    "pack",
    "quantize",
    "unpack",
]
