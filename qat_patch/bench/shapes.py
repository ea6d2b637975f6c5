"""The attention shapes that benchmarks time, and their inputs."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import torch

from qat_kernels.mask import Mask

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
    window: int = 0
    """How many keys a query sees in a causal call; 0: all."""
    block_size: int = 1
    """In a causal call: the tokens of a block of this size see each other."""

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From "batch,heads,key heads,queries,keys,head dim" and words: causal, packed, forward, window=N, block_size=N."""
        numbers, words = text.split(",")[:6], text.split(",")[6:]
        sizes = dict(word.split("=", 1) for word in words if "=" in word)
        flags = {word for word in words if "=" not in word}
        digits = all(number.isdigit() and int(number) for number in [*numbers, *sizes.values()])
        known = flags <= {"causal", "packed", "forward"} and sizes.keys() <= {"window", "block_size"}
        if len(numbers) != 6 or not digits or not known or (sizes and ("causal" not in flags or "packed" in flags)):
            raise argparse.ArgumentTypeError(
                "expected a shape such as 2,40,8,4096,4096,128,causal; window=N or block_size=N with causal, without packed; "
                f"got {text}"
            )
        batch, heads, key_heads, queries, keys, head_dim = map(int, numbers)
        causal, packed, forward_only = (word in flags for word in ("causal", "packed", "forward"))
        others = {name: int(size) for name, size in sizes.items()}
        return cls(batch, heads, key_heads, queries, keys, head_dim, causal, packed, forward_only, **others)

    def __str__(self) -> str:
        words = [word for word, on in zip(("causal", "packed"), self[6:8], strict=True) if on]
        words += [f"{name} {size}" for name, size in self.masking.items()]
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

    @property
    def masking(self) -> dict[str, Any]:
        """The options of `qat_kernels.attention` for windows and blocks."""
        return {name: size for name, size in (("window", self.window), ("block_size", self.block_size)) if size > 1}

    def flops(self, with_backward: bool) -> float:
        """Counted as FlashAttention does: 4 D for each pair of query and key, half with `causal`, 3.5 times with a backward.

        With windows or blocks only the visible pairs count.
        """
        if self.masking:
            mask = Mask(causal=True, window=self.window or None, block_size=self.block_size)
            lower, upper = mask.bounds(self.queries, self.keys, None, None, torch.device("cpu"))
            assert upper is not None, "a causal mask"
            first = 0 if lower is None else lower.clamp(min=0)
            pairs = self.batch * float((upper + 1 - first).clamp(min=0).sum())
        elif self.packed:
            pairs = sum(n * n for n in self.documents()) * (0.5 if self.causal else 1)
        else:
            pairs = self.batch * self.queries * self.keys * (0.5 if self.causal else 1)
        return 4 * self.heads * pairs * self.head_dim * (3.5 if with_backward else 1)


def packing(lengths: list[int], device: str) -> dict[str, Any]:
    """The keyword arguments of attention for packed documents of these lengths."""
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
