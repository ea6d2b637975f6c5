"""Check decoding from the FP4 cache, then time it against PyTorch's attention over BF16 keys and values, on a GPU.

python -m scripts.bench.decode --json decode.json               # a step of attention: 4k, 32k, 128k tokens, batch 1, 8, 32
python -m scripts.bench.decode --generate --json generate.json  # `generate`: prompts of 4k and 32k tokens, batch 1 and 8
python -m scripts.bench report decode.json --png decode.png     # a table and a picture of either

A step of ours adds the new token to the cache and attends: this package's own cache, and the one that holds what servers hold
(preset `kv_nvfp4`). PyTorch's only attends, with every backend that can. All are
captured in CUDA graphs, so that the time is the GPU's, and start with a cold L2 cache. Before anything is timed the last sequence
of that very step is compared with eager float32 (docs/NUMERICS.md, section 7).

`--generate` runs a model of Qwen3-14B's shape, with fewer layers and random weights, as its users do: original attention with the
BF16 cache that `generate` makes by itself, and 4-bit attention with the FP4 cache. What each run generates is not compared:
random weights say nothing. `--tiny` runs a small model, to see that all of it works.

The JSON is written after every cell.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qat_kernels import KVCache, QuantSpec
from qat_patch.bench.harness import OUTPUT_BOUND, machine, number_of_rounds, write
from scripts.arguments import new_parser

HEADS, KEY_HEADS, HEAD_DIM = 40, 8, 128
"""Of Qwen3-14B."""
CACHES = {"fp4 cache": QuantSpec(), "kv_nvfp4 cache": QuantSpec(preset="kv_nvfp4")}
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
L2_BYTES = 256 << 20
"""Larger than any L2 cache."""
NEW_TOKENS = 64
"""The number of tokens that --generate makes."""


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, time and print. Returns the measurements."""
    parser = new_parser("scripts.bench.decode", __doc__)
    parser.add_argument("--length", action="append", type=int, help="tokens in the cache, or in the prompt (see above)")
    parser.add_argument("--batch", action="append", type=int, help="sequences (see above)")
    parser.add_argument("--rounds", type=number_of_rounds, default=50, help="how often a step is timed (default: 50)")
    parser.add_argument("--generate", action="store_true", help="time `generate` instead of single steps of attention")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model for --generate (default: 8; Qwen3-14B has 40)")
    parser.add_argument("--tiny", action="store_true", help="a small model for --generate, which also runs on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        raise SystemExit("bench.decode: needs an NVIDIA GPU")
    if options.tiny and not options.generate:
        parser.error("--tiny: there is a small model for --generate only; for small steps pass --length and --batch")
    about = machine(device, "bfloat16")
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    model = language_model(options.layers, options.tiny, device) if options.generate else None
    lengths, batches = ([4096, 32768], [1, 8]) if options.generate else ([4096, 32768, 131072], [1, 8, 32])
    results = []
    for length in options.length or lengths:
        for batch in options.batch or batches:
            print(f"\nbatch {batch}, {length} tokens", flush=True)
            began = time.perf_counter()
            rows = step(batch, length, options.rounds) if model is None else generation(model, batch, length)
            for row in rows:
                print("  " + "  ".join(f"{key} {shown(value)}" for key, value in row.items()))
                results.append(about | {"batch": batch, "length": length} | row)
            write(results, options.json)
            print(f"  ({time.perf_counter() - began:.1f} s for this cell)", flush=True)
            torch.cuda.empty_cache()
    return results


def shown(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def step(batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds (quartiles) of one step of attention, and the bytes of keys and values."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(batch, heads, tokens, HEAD_DIM, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v = random(HEADS, 1), random(KEY_HEADS, length), random(KEY_HEADS, length)
    new = k[:, :, -1:].contiguous(), v[:, :, -1:].contiguous()
    caches = {name: KVCache() for name in CACHES}
    candidates: dict[str, Callable[[], None]] = {}
    for (name, cache), spec in zip(caches.items(), CACHES.values(), strict=True):
        cache.append(k[:, :, :-1], v[:, :, :-1], spec=spec)
        print(f"  {name}:", end="")
        check(cache, q, *new)

        def ours(cache: KVCache = cache, spec: QuantSpec = spec) -> None:
            # A copy, because the cache itself must keep alive what the graph reads.
            copy.copy(cache).attention(q, *new, spec=spec)

        candidates[name] = ours
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
    quartiles = {name: statistics.quantiles(times, n=4, method="inclusive") for name, times in milliseconds.items()}
    best = min(median for name, (_, median, _) in quartiles.items() if name not in caches)
    bytes_ = {name: caches[name].nbytes if name in caches else 2 * k.nbytes for name in quartiles}
    return [
        {"name": name, "ms": median, "low": low, "high": high, "bytes": bytes_[name], "times_best_bf16": best / median}
        for name, (low, median, high) in quartiles.items()
    ]


def check(cache: KVCache, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Stop unless the output for the last sequence is that of eager float32 with the same bytes."""
    expected, actual = copy.copy(cache), copy.copy(cache)
    assert cache.spec is not None, "it was filled"
    expected.select(torch.tensor([q.shape[0] - 1]))
    expected = expected.attention(*(x[-1:] for x in (q, k, v)), spec=cache.spec, impl="eager").float()
    actual = actual.attention(q, k, v, spec=cache.spec, impl="triton")[-1:].float()
    error = ((actual - expected).norm() / expected.norm()).item()
    if not error < OUTPUT_BOUND:
        raise SystemExit(f"bench.decode: relative L2 of the output: expected less than {OUTPUT_BOUND:.0e}, got {error:.2e}")
    print(f"  relative L2 of the output {error:.2e}")


def captured(call: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A call as a CUDA graph."""
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
    """The milliseconds of every round. The candidates take turns; the first five rounds warm up and do not count."""
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


def language_model(layers: int, tiny: bool, device: str) -> torch.nn.Module:
    """A model of Qwen3-14B's shape with another number of layers, with random bfloat16 weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS}
    sizes |= {"head_dim": HEAD_DIM, "vocab_size": 151936, "rope_theta": 1e6}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"head_dim": 32, "vocab_size": 128}
    torch.manual_seed(0)
    with torch.device(device):
        config = Qwen3Config(**sizes, num_hidden_layers=layers, max_position_embeddings=1 << 18, eos_token_id=None)
        return Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


class Clock:
    """A streamer that notes the time of the prompt and of each new token, after waiting for the device."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left."""


def generation(model: torch.nn.Module, batch: int, length: int) -> list[dict[str, Any]]:
    """The seconds to the first of NEW_TOKENS, tokens per second (quartiles) after it and overall, and the bytes of the cache.

    Each runs twice; the first run compiles and does not count.
    """
    from transformers import DynamicCache

    import qat_patch
    from qat_patch.hosts.transformers.cache import FP4Layer

    def size(layer: Any) -> int:
        return layer.packed.nbytes if isinstance(layer, FP4Layer) else layer.keys.nbytes + layer.values.nbytes

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def row(name: str, new_cache: Callable[[], Any]) -> dict[str, Any]:
        for _ in range(2):
            clock, cache = Clock(), new_cache()
            model.generate(ids, past_key_values=cache, streamer=clock, **options)
        began, first, *_, last = clock.times
        assert len(clock.times) == 1 + NEW_TOKENS, len(clock.times)
        seconds = [after - before for before, after in itertools.pairwise(clock.times[1:])]
        rates = [batch / x for x in statistics.quantiles(seconds, n=4, method="inclusive")][::-1]
        return {
            "name": name,
            "layers": model.config.num_hidden_layers,
            "first_token_seconds": first - began,
            "tokens_per_second": rates,
            "tokens_per_second_in_all": batch * NEW_TOKENS / (last - began),
            "cache_bytes": sum(map(size, cache.layers)),
        }

    rows = [row("bf16 cache", lambda: DynamicCache(config=model.config))]
    with qat_patch.patch_model(model) as handle:
        rows.append(row("fp4 cache", handle.cache))
    return rows


if __name__ == "__main__":
    main()
