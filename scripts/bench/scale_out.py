"""Compare training on several GPUs with one: the same synthetic run on one GPU, and with DDP, FSDP2, Ulysses or ring.

torchrun --nproc_per_node 1 -m scripts.bench.scale_out run wan one --seed 0 --json one-0.json       # and seeds 1 and 2
torchrun --nproc_per_node 2 -m scripts.bench.scale_out run wan ulysses --seed 0 --json ulysses-0.json
python -m scripts.bench.scale_out compare one-0.json one-1.json one-2.json --with ulysses-0.json

Models have layers of the real sizes (Wan 2.1 1.3B, Qwen3-0.6B), and four of them, with random weights. Every step has two
samples: both on the one GPU, one on each of two (DDP, FSDP2), or the tokens of both split over all (Ulysses, ring; Wan only).
`compare` holds the mean of the last 50 losses against that of one GPU's runs: it must lie within twice their spread (largest
minus smallest).
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import qat_patch
from scripts.arguments import new_parser

SAMPLES = 2
LAST = 50


class WanRun:
    """Flow matching on smooth latents."""

    def __init__(self, tiny: bool) -> None:
        from diffusers import WanTransformer3DModel

        sizes = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 4, "ffn_dim": 8960, "text_dim": 4096}
        self.latent = (16, 5, 32, 32)
        if tiny:
            sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "ffn_dim": 32, "text_dim": 16}
            self.latent = (16, 2, 8, 8)
        self.text_dim = sizes["text_dim"]
        self.model = WanTransformer3DModel(**sizes, freq_dim=256, in_channels=16, out_channels=16)
        self.blocks = list(self.model.blocks)

    def batch(self, generator: torch.Generator) -> list[torch.Tensor]:
        coarse = torch.randn(SAMPLES, *self.latent[:2], 4, 4, generator=generator)
        video = torch.nn.functional.interpolate(coarse, self.latent[1:], mode="trilinear")
        noise = torch.randn(SAMPLES, *self.latent, generator=generator)
        text = torch.randn(SAMPLES, 512, self.text_dim, generator=generator)
        return [video, noise, text, torch.rand(SAMPLES, generator=generator)]

    def loss(self, model: torch.nn.Module, video, noise, text, time) -> torch.Tensor:
        mixed = torch.lerp(video, noise, time[:, None, None, None, None])
        velocity = model(mixed, time * 1000, text, return_dict=False)[0]
        return (velocity.float() - (noise - video)).square().mean()


class Qwen3Run:
    """Next tokens of a random walk over the vocabulary."""

    def __init__(self, tiny: bool) -> None:
        from transformers import AutoModelForCausalLM, Qwen3Config

        sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
        sizes |= {"num_hidden_layers": 4, "intermediate_size": 3072, "vocab_size": 4096}
        self.tokens = 1024
        if tiny:
            sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
            sizes |= {"num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 64}
            self.tokens = 32
        self.model = AutoModelForCausalLM.from_config(Qwen3Config(**sizes))
        self.blocks = list(self.model.model.layers)
        self.vocabulary = sizes["vocab_size"]

    def batch(self, generator: torch.Generator) -> list[torch.Tensor]:
        steps = torch.randint(1, 4, (SAMPLES, self.tokens), generator=generator)
        return [(steps.cumsum(1) + torch.randint(self.vocabulary, (SAMPLES, 1), generator=generator)) % self.vocabulary]

    def loss(self, model: torch.nn.Module, ids) -> torch.Tensor:
        out = model(ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(out.flatten(0, 1).float(), ids[:, 1:].flatten())


RUNS = {"wan": WanRun, "qwen3": Qwen3Run}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run or compare. The exit status is 1 if a comparison fails."""
    parser = new_parser("scripts.bench.scale_out", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="under torchrun")
    run.add_argument("model", choices=RUNS)
    run.add_argument("how", choices=["one", "ddp", "fsdp2", "ulysses", "ring"])
    run.add_argument("--seed", type=int, required=True)
    run.add_argument("--steps", type=int, default=300)
    run.add_argument("--learning-rate", type=float, default=1e-4)
    run.add_argument("--tiny", action="store_true")
    run.add_argument("--json", type=Path, required=True)
    compare = commands.add_parser("compare")
    compare.add_argument("one", type=Path, nargs="+", help="runs of one GPU with three seeds")
    compare.add_argument("--with", dest="other", type=Path, nargs="+", required=True, help="runs of several")
    options = parser.parse_args(arguments)
    if options.command == "compare":
        return _compare(options.one, options.other)
    losses = train(options.model, options.how, options.seed, options.steps, options.learning_rate, options.tiny)
    if int(os.environ["RANK"]) == 0:
        options.json.write_text(json.dumps({"model": options.model, "how": options.how, "seed": options.seed, "losses": losses}))
        print(f"{options.model} {options.how}: {losses[0]:.4f} to {statistics.fmean(losses[-LAST:]):.4f}")
    return 0


def train(model: str, how: str, seed: int, steps: int, learning_rate: float, tiny: bool) -> list[float]:
    """The losses of a run, by step."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    splits_tokens, splits_samples = how in ("ulysses", "ring"), how in ("ddp", "fsdp2")
    if ranks != (1 if how == "one" else 2) or (splits_tokens and model != "wan"):
        raise SystemExit(f"scale_out: {how} of {model}: expected one process for one, else two; ulysses and ring are for wan")
    torch.manual_seed(seed)
    run = RUNS[model](tiny)
    run.model.to(device).train()
    if splits_tokens:
        from diffusers import ContextParallelConfig

        run.model.enable_parallelism(config=ContextParallelConfig(**{f"{how}_degree": ranks}))
    qat_patch.patch_model(run.model)
    trained = _wrapped(run.model, run.blocks, how, device)
    optimizer = torch.optim.AdamW(run.model.parameters(), lr=learning_rate)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        batch = [x.to(device) for x in run.batch(generator)]
        if splits_samples:
            batch = [x[rank::ranks] for x in batch]
        with torch.autocast(device.type, torch.bfloat16, enabled=how != "fsdp2"):
            loss = run.loss(trained, *batch)
        loss.backward()
        if splits_tokens:  # each rank has the part of its tokens
            for parameter in run.model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if splits_samples:
            dist.all_reduce(loss)
            loss /= ranks
        losses.append(loss.item())
    # No process may end while another computes, and the group must be freed last: otherwise a process may wait forever.
    dist.barrier()
    del trained, optimizer, run
    dist.destroy_process_group()
    return losses


def _wrapped(model: torch.nn.Module, blocks: list[torch.nn.Module], how: str, device: torch.device) -> Callable:
    if how == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    if how == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _compare(one: list[Path], others: list[Path]) -> int:
    def end(file: Path) -> float:
        return statistics.fmean(json.loads(file.read_text(encoding="utf-8"))["losses"][-LAST:])

    ends = [end(file) for file in one]
    middle, spread = statistics.fmean(ends), max(ends) - min(ends)
    print(f"one GPU: {middle:.5f}, spread of {len(ends)} seeds {spread:.5f}")
    failed = 0
    for file in others:
        apart = abs(end(file) - middle)
        holds = apart <= 2 * spread
        failed += not holds
        print(f"{file}: {end(file):.5f}, {apart:.5f} away: {'within' if holds else 'NOT within'} twice the spread")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
