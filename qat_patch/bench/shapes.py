"""The problems that benchmarks time, and their inputs."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

GPU_SHAPES = (
    "1,12,12,32760,32760,128",  # Wan 2.1 1.3B self-attention at 480p
    "1,40,40,32760,512,128",  # 14B cross-attention
    "1,40,40,75600,75600,128,forward",  # 14B self-attention at 720p
    "2,40,8,4096,4096,128,causal",  # Qwen3-14B
    "1,40,8,16384,16384,128,causal",
    "1,40,8,16384,16384,128,causal,packed",
    "4,16,16,8192,8192,64",
)
INFERENCE_SHAPES = tuple(
    f"{shape},forward"
    for shape in ("1,12,12,32760,32760,128", "1,40,40,32760,512,128", "2,40,8,4096,4096,128,causal", "4,16,16,8192,8192,64")
)
"""Self-attention of Wan 2.1 1.3B, cross-attention of 14B, Qwen3-14B, and head dim 64."""
FIGURE_5_SHAPES = tuple(
    f"16,16,16,{length << 10},{length << 10},{dim},forward" for dim in (128, 64) for length in (1, 2, 4, 8, 16, 32)
)
"""The grid of the paper's figure 5, which it measured on an RTX 5090."""
CPU_SHAPES = ("1,12,12,512,512,128", "2,9,3,256,256,64,causal")


class Shape(NamedTuple):
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    head_dim: int
    causal: bool = False
    packed: bool = False
    forward_only: bool = False

    @classmethod
    def parse(cls, text: str) -> Shape:
        numbers, words = text.split(",")[:6], text.split(",")[6:]
        digits = all(number.isdigit() and int(number) for number in numbers)
        if len(numbers) != 6 or not digits or not {"causal", "packed", "forward"}.issuperset(words):
            raise argparse.ArgumentTypeError(f"expected a shape such as 2,40,8,4096,4096,128,causal, got {text}")
        batch, heads, key_heads, queries, keys, head_dim = map(int, numbers)
        causal, packed, forward_only = (word in words for word in ("causal", "packed", "forward"))
        return cls(batch, heads, key_heads, queries, keys, head_dim, causal, packed, forward_only)

    def __str__(self) -> str:
        words = [word for word, on in zip(("causal", "packed"), self[6:8], strict=True) if on]
        heads = self.heads if self.heads == self.key_heads else f"{self.heads}/{self.key_heads}"
        length = self.queries if self.queries == self.keys else f"{self.queries}x{self.keys}"
        return f"B {self.batch}, H {heads}, L {length}, D {self.head_dim}" + "".join(f", {word}" for word in words)

    def documents(self) -> list[int]:
        """Lengths of the packed documents: a half, a quarter, and so on of all tokens."""
        left, lengths = self.batch * self.queries, []
        while left > 256:
            lengths.append((left + 1) // 2)
            left -= lengths[-1]
        return [*lengths, left]

    def flops(self, with_backward: bool) -> float:
        """As FlashAttention counts them: 4 D a pair of query and key, half as many with `causal`, 3.5 times with a backward."""
        pairs = sum(n * n for n in self.documents()) if self.packed else self.batch * self.queries * self.keys
        return 4 * self.heads * pairs * self.head_dim * (3.5 if with_backward else 1) * (0.5 if self.causal else 1)


def packing(lengths: list[int], device: str) -> dict[str, Any]:
    """The keywords of attention on packed documents of these lengths."""
    bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    return {f"cu_seqlens_{x}": bounds for x in "qk"} | {f"max_seqlen_{x}": max(lengths) for x in "qk"}


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Unit-Gaussian q, k, v and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)
    query: tuple[int, ...] = (shape.batch, shape.heads, shape.queries, shape.head_dim)
    key: tuple[int, ...] = (shape.batch, shape.key_heads, shape.keys, shape.head_dim)
    if shape.packed:
        query, key = ((x[0] * x[2], x[1], x[3]) for x in (query, key))
    made = [torch.randn(size, generator=generator, device=device, dtype=dtype) for size in (query, key, key, query)]
    return [x.requires_grad_(not shape.forward_only) for x in made[:3]] + made[3:]
