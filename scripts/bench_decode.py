"""Decoding from the FP4 cache against PyTorch's own attention over BF16 keys and values, on a GPU, after a check.

python scripts/bench_decode.py --json decode.json               # a step of attention: 4k, 32k, 128k tokens, batch 1, 8, 32
python scripts/bench_decode.py --generate --json generate.json  # tokens per second of `generate`, a model of Qwen3-14B's shape

A step of ours adds the new token to the cache and attends; PyTorch's only attends, with every backend that can. Both are
captured in CUDA graphs, so that the time is the GPU's, and start with a cold L2 cache. Before anything is timed a sequence of the
batch is compared with eager float32 (docs/NUMERICS.md, section 7).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench import OUTPUT_BOUND
from qat_kernels import KVCache

HEADS, KEY_HEADS, HEAD_DIM = 40, 8, 128
"""Of Qwen3-14B."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
L2_BYTES = 256 << 20
"""More than any L2 cache holds."""


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, time, print; returns what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", action="append", type=int, help="tokens in the cache (default: 4096, 32768 and 131072)")
    parser.add_argument("--batch", action="append", type=int, help="sequences (default: 1, 8 and 32; with --generate 1 and 8)")
    parser.add_argument("--rounds", type=int, default=50, help="how often each is timed (default: 50)")
    parser.add_argument("--generate", action="store_true", help="time `generate` instead of single steps of attention")
    parser.add_argument("--layers", type=int, default=8, help="of the model of --generate (default: 8; Qwen3-14B has 40)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench_decode: needs an NVIDIA GPU")
    import triton

    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    results = []
    for length in options.length or ([4096] if options.generate else [4096, 32768, 131072]):
        for batch in options.batch or ([1, 8] if options.generate else [1, 8, 32]):
            print(f"\nbatch {batch}, {length} tokens")
            rows = generation(batch, length, options.layers) if options.generate else step(batch, length, options.rounds)
            for row in rows:
                print(
                    "  "
                    + "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items())
                )
                results.append(about | {"batch": batch, "length": length} | row)
            torch.cuda.empty_cache()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def step(batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds (quartiles) of one step of attention, and the bytes of keys and values."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = random(HEADS, 1), random(KEY_HEADS, length), random(KEY_HEADS, length)
    cache = KVCache()
    cache.append(k[:, :, :-1], v[:, :, :-1])
    new = k[:, :, -1:].contiguous(), v[:, :, -1:].contiguous()
    check(cache, q, *new)

    def ours() -> None:
        cache.attention(q, *new)
        cache.crop(1)

    candidates: dict[str, Callable[[], None]] = {"fp4 cache": ours}
    for name, backend in BACKENDS.items():

        def theirs(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(q, k, v, enable_gqa=True)

        try:
            theirs()
            candidates[f"bf16 sdpa {name}"] = theirs
        except RuntimeError as error:
            print(f"  bf16 sdpa {name}: left out: {str(error).splitlines()[0]}")
    milliseconds = measure({name: captured(call) for name, call in candidates.items()}, rounds)
    quartiles = {name: statistics.quantiles(times, n=4) for name, times in milliseconds.items()}
    best = min(median for name, (_, median, _) in quartiles.items() if name != "fp4 cache")
    bytes_ = {name: cache.nbytes if name == "fp4 cache" else 2 * k.nbytes for name in quartiles}
    return [
        {"name": name, "ms": median, "low": low, "high": high, "bytes": bytes_[name], "times_best_bf16": best / median}
        for name, (low, median, high) in quartiles.items()
    ]


def check(cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """End the program unless the last sequence of the batch is what eager float32 makes of the same bytes."""
    last = torch.tensor([q.shape[0] - 1])
    actual, expected = copy.copy(cache), copy.copy(cache)
    outputs = []
    for each, impl in ((actual, "triton"), (expected, "eager")):
        each.select(last)
        outputs.append(each.attention(*(x[-1:] for x in (q, k, v)), impl=impl).float())
    error = ((outputs[0] - outputs[1]).norm() / outputs[1].norm()).item()
    if not error < OUTPUT_BOUND:
        raise SystemExit(f"bench_decode: relative L2 of the output: expected less than {OUTPUT_BOUND:.0e}, got {error:.2e}")
    print(f"  relative L2 of the output {error:.2e}")


def captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The GPU's work of a call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def measure(graphs: dict[str, torch.cuda.CUDAGraph], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round, the candidates taking turns; the first five rounds warm up and do not count."""
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    milliseconds: dict[str, list[float]] = {name: [] for name in graphs}
    for round_number in range(rounds + 5):
        for name, graph in graphs.items():
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            began.record()
            graph.replay()
            ended.record()
            torch.cuda.synchronize()
            if round_number >= 5:
                milliseconds[name].append(began.elapsed_time(ended))
    return milliseconds


def generation(batch: int, length: int, layers: int, tokens: int = 64) -> list[dict[str, Any]]:
    """Tokens per second of `generate` after a prompt, the prompt's own time taken off: original attention, and the FP4 cache."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import qat_patch

    config = Qwen3Config(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=layers, num_attention_heads=HEADS, vocab_size=151936,
        num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM, max_position_embeddings=length + tokens + 1,
    )  # fmt: skip
    with torch.device("cuda"):
        model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).cuda()

    def seconds(new_tokens: int, new_cache: Callable[[], Any] | None) -> float:
        cache = {} if new_cache is None else {"past_key_values": new_cache()}
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **cache)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    def row(name: str, new_cache: Callable[[], Any] | None) -> dict[str, Any]:
        seconds(4, new_cache)  # compiles
        rates = [batch * (tokens - 1) / (seconds(tokens, new_cache) - seconds(1, new_cache)) for _ in range(3)]
        return {
            "name": name,
            "layers": layers,
            "tokens_per_second": statistics.median(rates),
            "low": min(rates),
            "high": max(rates),
        }

    rows = [row("original attention, bf16 cache", None)]
    with qat_patch.patch_model(model) as handle:
        rows.append(row("4-bit attention, fp4 cache", handle.cache))
    return rows


if __name__ == "__main__":
    main()
