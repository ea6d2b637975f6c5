"""Time a training step through 4-bit attention against one through PyTorch's SDPA, interleaved, in the same model.

python -m scripts.bench.training --json training.json
python -m scripts.bench.training smollm2-135m qwen3-0.6b-lora --json small.json

A step is forward, backward and AdamW in bfloat16, with random weights and inputs of the real sizes: Wan 2.1 T2V 1.3B, all
weights, 81 frames of 480x832; Qwen3-14B and Qwen3-0.6B with LoRA of rank 16, 4096 tokens; SmolLM2-135M, all weights, 8 x 1024
tokens. All but the last use gradient checkpointing. It prints the median and quartiles of a step's seconds, the peak memory,
and both as multiples of SDPA's. Then it prints the host time of one call of attention with the model's heads and 256 tokens,
for inference (without a gradient) and for training (forward and backward); a small model pays this in every layer. Nothing is
timed unless the two losses agree and all gradients are finite. Without a name all models run, one after the other, and the JSON
is written after each. `--tiny` runs small models, as a test.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

import qat_kernels
import qat_patch
from qat_patch.bench.harness import machine, number_of_rounds, write
from scripts.arguments import new_parser
from scripts.bench.model_configs import CONFIGS, SMOLLM2_135M, SMOLLM2_TINY, TINY_CONFIGS

LOSSES_AGREE = 0.1
"""The largest difference of the losses, relative to SDPA's."""


class Problem(NamedTuple):
    """A model and how to get its loss."""

    model: torch.nn.Module
    loss: Callable[[], torch.Tensor]
    what: str
    heads: tuple[int, int, int]
    """The heads of queries and of keys, and the head dim."""
    causal: bool


def wan(device: str, tiny: bool) -> Problem:
    """Flow matching on a video latent: 21 x 60 x 104, in patches of 1 x 2 x 2 that is 32,760 tokens."""
    from diffusers import WanTransformer3DModel

    sizes = TINY_CONFIGS["Wan 2.1 tiny"] if tiny else CONFIGS["Wan 2.1 1.3B"]
    latent = (1, 16, 3, 8, 8) if tiny else (1, 16, 21, 60, 104)
    torch.manual_seed(0)
    with torch.device(device):
        model = WanTransformer3DModel(**sizes, freq_dim=256, in_channels=16, out_channels=16).to(torch.bfloat16).train()
        video, noise = (torch.randn(latent, dtype=torch.bfloat16) for _ in range(2))
        text = torch.randn(1, 512, sizes["text_dim"], dtype=torch.bfloat16)
        timestep = torch.tensor([500])
    model.enable_gradient_checkpointing()

    def loss() -> torch.Tensor:
        velocity = model((video + noise) / 2, timestep, text, return_dict=False)[0]
        return (velocity.float() - (noise - video).float()).square().mean()

    what = f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} G weights, latent {latent}"
    heads = sizes["num_attention_heads"]
    return Problem(model, loss, what, (heads, heads, sizes["attention_head_dim"]), causal=False)


def qwen3_lora(name: str, device: str, tiny: bool) -> Problem:
    """Next tokens of one sequence. `name`: in scripts.bench.model_configs."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen3Config

    sizes = TINY_CONFIGS["Qwen3 tiny"] if tiny else CONFIGS[name]
    config, tokens = Qwen3Config(**sizes, rope_theta=1e6), 64 if tiny else 4096
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
        ids = torch.randint(sizes["vocab_size"], (1, tokens))
    # Older releases of transformers have another name for it.
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    model.enable_input_require_grads()
    weights = sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    what = f"{weights / 1e9:.2f} G weights, LoRA of rank 16, {tokens} tokens"
    return Problem(model, lambda: model(ids, labels=ids, use_cache=False).loss, what, _heads(sizes), causal=True)


def smollm2(device: str, tiny: bool) -> Problem:
    """Next tokens of eight sequences; small enough to keep all activations."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = SMOLLM2_TINY if tiny else SMOLLM2_135M
    config, shape = LlamaConfig(**sizes, rope_theta=1e5), (2, 64) if tiny else (8, 1024)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
        ids = torch.randint(sizes["vocab_size"], shape)
    what = f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M weights, {shape[0]} rows of {shape[1]} tokens"
    return Problem(model, lambda: model(ids, labels=ids, use_cache=False).loss, what, _heads(sizes), causal=True)


def _heads(sizes: dict[str, int]) -> tuple[int, int, int]:
    return sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]


PROBLEMS: dict[str, Callable[[str, bool], Problem]] = {
    "wan2.1-1.3b": wan,
    "qwen3-14b-lora": partial(qwen3_lora, "Qwen3 14B"),
    "qwen3-0.6b-lora": partial(qwen3_lora, "Qwen3 0.6B"),
    "smollm2-135m": smollm2,
}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Check, time and print. Returns the measurements."""
    parser = new_parser("scripts.bench.training", __doc__)
    parser.add_argument("problem", nargs="*", metavar="PROBLEM", help=f"default: {', '.join(PROBLEMS)}")
    parser.add_argument("--rounds", type=number_of_rounds, default=5, help="how often each attention is timed (default: 5)")
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    options = parser.parse_args(arguments)
    for name in options.problem:
        if name not in PROBLEMS:
            parser.error(f"PROBLEM: expected {', '.join(PROBLEMS)}, got {name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = machine(device, "bfloat16")
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    results = []
    for name in options.problem or PROBLEMS:
        described = about | {"problem": name, "tiny": options.tiny}
        results += [described | result for result in measured(name, device, options.rounds, options.tiny)]
        write(results, options.json)
        gc.collect()  # so that the peak of the next one has nothing of this one
    return results


def measured(name: str, device: str, rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """Check, time and print one of `PROBLEMS`."""
    problem = PROBLEMS[name](device, tiny)
    print(f"{name}: {problem.what}", flush=True)
    handle = qat_patch.patch_model(problem.model)
    attentions = {"sdpa": handle.disabled, "4-bit": contextlib.nullcontext}
    check(problem, attentions)
    results: list[dict[str, Any]] = []
    for which, (seconds, peak) in measure(problem, attentions, device, rounds).items():
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        results.append({"name": which, "seconds": [low, median, high], "peak_bytes": peak})
        print(f"  {which:6} {median:9.3f} s ({low:.3f} to {high:.3f})" + (f"  peak {peak / 2**30:.2f} GiB" if peak else ""))
    sdpa, ours = results
    memory = f", {ours['peak_bytes'] / sdpa['peak_bytes']:.3f} x the memory" if sdpa["peak_bytes"] else ""
    print(f"  4-bit is {ours['seconds'][1] / sdpa['seconds'][1]:.3f} x the time{memory}")
    for which, seconds in host_time(problem, device, 20 if tiny else 200).items():
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        results.append({"name": f"host, {which}", "seconds": [low, median, high]})
        print(f"  host time of a call, {which:16} {1e6 * median:7.1f} us ({1e6 * low:.1f} to {1e6 * high:.1f})", flush=True)
    return results


Attentions = dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]


def check(problem: Problem, attentions: Attentions) -> None:
    """Stop unless the losses are close but not equal, and all gradients are finite."""
    losses = {}
    for name, attention in attentions.items():
        problem.model.zero_grad()
        with attention():
            loss = problem.loss()
            loss.backward()
        losses[name] = loss.item()
        finite = torch.stack([p.grad.isfinite().all() for p in problem.model.parameters() if p.grad is not None])
        if not finite.all():
            raise SystemExit(f"bench.training: {name}: {int((~finite).sum())} gradients are not finite; nothing timed")
    apart = abs(losses["4-bit"] - losses["sdpa"]) / losses["sdpa"]
    print("  losses: " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()), flush=True)
    if not 0 < apart < LOSSES_AGREE:
        raise SystemExit(f"bench.training: losses: expected a difference in (0, {LOSSES_AGREE}), got {apart:.2e}; nothing timed")


def measure(problem: Problem, attentions: Attentions, device: str, rounds: int) -> dict[str, tuple[list[float], int]]:
    """The seconds of every round and the peak memory in bytes. The two take turns; the first round warms up."""
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in attentions}
    peaks = dict.fromkeys(attentions, 0)
    for round_number in range(rounds + 1):
        for name, attention in attentions.items():
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            synchronize()
            began = time.perf_counter()
            with attention():
                problem.loss().backward()
            optimizer.step()
            synchronize()
            if round_number:
                seconds[name].append(time.perf_counter() - began)
                if device == "cuda":
                    peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
    return {name: (seconds[name], peaks[name]) for name in attentions}


def host_time(problem: Problem, device: str, calls: int) -> dict[str, list[float]]:
    """The seconds until a call of attention returns, with nothing queued before it."""
    heads, key_heads, head_dim = problem.heads
    q, k, v, grad_out = (
        torch.randn(1, 256, n, head_dim, dtype=torch.bfloat16, device=device).transpose(1, 2)
        for n in (heads, key_heads, key_heads, heads)
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {}
    for name, attention in (
        ("sdpa", partial(scaled_dot_product_attention, is_causal=problem.causal, enable_gqa=heads != key_heads)),
        ("4-bit", partial(qat_kernels.attention, causal=problem.causal)),
    ):

        def inference(attention: Callable[..., torch.Tensor] = attention) -> None:
            with torch.no_grad():
                attention(q, k, v)

        def training(attention: Callable[..., torch.Tensor] = attention) -> None:
            torch.autograd.grad(attention(*leaves), leaves, grad_out)

        for what, call in (("inference", inference), ("training", training)):
            times = seconds[f"{name} {what}"] = []
            for number in range(calls + 10):  # the first ones warm up
                synchronize()
                began = time.perf_counter()
                call()
                if number >= 10:
                    times.append(time.perf_counter() - began)
    synchronize()
    return seconds


if __name__ == "__main__":
    main()
