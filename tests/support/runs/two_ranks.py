"""Run under torchrun by test_two_ranks.py: patched models on two ranks against the same on one, forward and backward."""

import gc
import sys

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import qat_patch
from qat_recipes.tasks.experts import Experts
from support.models.lively_wan import tiny_wan, wan_inputs
from support.models.tiny_qwen3 import tiny_qwen3, token_ids


def step(model, inputs):
    out = model(**inputs, return_dict=False)[0]
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def context_parallel(kind):
    # diffusers asks for the accelerators of this machine. Told that the CPU is one, it does the same over gloo.
    torch._C._get_accelerator = lambda: torch.device("cpu")
    torch.accelerator.device_count = lambda: 1
    inputs = wan_inputs(i2v=False)
    inputs["hidden_states"] = torch.randn(2, 4, 4, 8, 6, generator=torch.Generator().manual_seed(2))  # 48 tokens, 24 a rank
    one, two, late = tiny_wan(), tiny_wan(), tiny_wan()
    qat_patch.patch_model(one)
    qat_patch.calibrate(one, [inputs])
    expected, gradients = step(one, inputs)
    config = ContextParallelConfig(**{f"{kind}_degree": 2})
    two.enable_parallelism(config=config)
    handle = qat_patch.patch_model(two, **qat_patch.get_handle(one).shifts)
    out, found = step(two, inputs)
    # Groups of 16 tokens lie across the ranks, and yet:
    assert torch.equal(out, expected)
    for name, gradient in gradients.items():
        dist.all_reduce(found[name])  # each rank has what its tokens contribute
        assert ((found[name] - gradient).norm() / gradient.norm()).item() < 1e-5, name
    assert found.keys() == gradients.keys()
    if kind == "ulysses":  # PyTorch's own attention knows no ring
        with handle.disabled():
            assert not torch.equal(step(two, inputs)[0], out)

    with pytest.raises(ValueError, match="plain self-attention, got a mask, or a measurement such as calibrate"):
        qat_patch.calibrate(two, [inputs | {"return_dict": False}])
    with pytest.raises(ValueError, match="<4-bit attention of blocks.0.attn1, .*enable parallelism before patch_model"):
        qat_patch.patch_model(late)
        late.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": 2}))
    uneven = tiny_wan()
    uneven.enable_parallelism(config=ContextParallelConfig(**{f"{kind}_degree": 2, f"{kind}_anything": True}))
    qat_patch.patch_model(uneven)
    with pytest.raises(ValueError, match="got ulysses_anything or ring_anything; set them to False"):
        step(uneven, inputs)


def calibration():
    """Every rank measures its own batches, and all get the mean of all."""
    batches = [token_ids(seed=seed) for seed in range(4)]
    model = tiny_qwen3()
    handle = qat_patch.patch_model(model)
    qat_patch.calibrate(model, batches[dist.get_rank() :: 2])
    found = handle.shifts
    everywhere = [None, None]
    dist.all_gather_object(everywhere, found)
    torch.testing.assert_close(everywhere[0], everywhere[1], rtol=0, atol=0)
    with torch.no_grad():
        alone = tiny_qwen3()
        handle = qat_patch.patch_model(alone)
        seen = []
        with handle.observed(lambda layer, call: seen.append((layer.name, call))):
            for batch in batches:
                alone(batch)
    for name in handle.patched:
        calls = [call for layer, call in seen if layer == name]
        keys = torch.stack([call.key.mean((0, 2)) for call in calls]).mean(0)
        queries = torch.stack([call.query.unflatten(1, (2, -1)).mean((0, 2, 3)) for call in calls]).mean(0)
        assert torch.allclose(found["k_shift"][name], keys, atol=1e-5)
        assert torch.allclose(found["q_shift"][name], queries, atol=1e-5)
    calibration_in_another_order()
    # And the largest input of all.
    scales = []
    for mine in (batches[dist.get_rank() :: 2], batches):
        model = tiny_qwen3()
        linears = qat_patch.quantize_linears(model, qat_patch.LinearQATConfig(global_scale="compressed_tensors"))
        with torch.no_grad(), linears.calibration():
            for batch in mine:
                model(batch)
        scales.append(linears.scales)
    assert scales[0] == scales[1]


def calibration_in_another_order():
    """Ranks reach two models in other orders, and on one of them the cross-attention sees one set of keys, not two."""
    experts = Experts({"one": tiny_wan(i2v=True), "two": tiny_wan(i2v=True, seed=1)})
    for expert in experts.children():
        qat_patch.patch_model(expert)
    handle = qat_patch.get_handle(experts)
    batches = [wan_inputs(i2v=True) | {"expert": name} for name in ("one", "two")]
    if dist.get_rank():
        batches = [batch | {"encoder_hidden_states_image": None} for batch in reversed(batches)]
    qat_patch.calibrate(experts, batches)
    found, everywhere = handle.shifts, [None, None]
    dist.all_gather_object(everywhere, found)
    torch.testing.assert_close(everywhere[0], everywhere[1], rtol=0, atol=0)
    assert found["q_shift"].keys() - found["k_shift"].keys() == {name for name in handle.patched if name.endswith("attn2")}
    names, means = {layer: name for name, layer in handle.patched.items()}, {}
    with torch.no_grad(), handle.observed(lambda layer, call: means.setdefault(names[layer], call.query.mean((0, 2)))):
        for batch in batches:
            experts(**batch)
    for name in ("one.blocks.0.attn1", "two.blocks.0.attn1"):  # which see no image
        assert torch.allclose(found["q_shift"][name], means[name], atol=1e-5), name


def data_parallel(shard):
    """DDP and FSDP2: every rank has half of the batch, and the mean gradient is that of the whole."""
    for build, inputs, call in (
        (tiny_wan, wan_inputs(i2v=False), lambda model, inputs: model(**inputs, return_dict=False)[0]),
        (tiny_qwen3, {"input_ids": token_ids()}, lambda model, inputs: model(**inputs, use_cache=False).logits),
    ):
        one, two = build(), build()
        handle = qat_patch.patch_model(one)
        with torch.no_grad():
            keys, queries = {}, {}

            def keep(layer, call, keys=keys, queries=queries):
                keys[layer.name] = call.key.mean((0, 2))
                queries[layer.name] = call.query.unflatten(1, (call.key.shape[1], -1)).mean((0, 2, 3))

            with handle.observed(keep):
                call(one, inputs)
        qat_patch.unpatch_model(one)
        for model in (one, two):
            qat_patch.patch_model(model, k_shift=keys, q_shift=queries)
        call(one, inputs).square().mean().backward()
        if shard:
            for block in two.blocks if build is tiny_wan else two.model.layers:
                fully_shard(block, mesh=init_device_mesh("cpu", (2,)))
            parallel = fully_shard(two, mesh=init_device_mesh("cpu", (2,)))
        else:
            parallel = torch.nn.parallel.DistributedDataParallel(two)
        assert qat_patch.get_handle(parallel) is qat_patch.get_handle(two)
        mine = {name: x[dist.get_rank()].unsqueeze(0) for name, x in inputs.items()}
        call(parallel, mine).square().mean().backward()
        found = {name: p.grad.full_tensor() if shard else p.grad for name, p in two.named_parameters()}
        for name, parameter in one.named_parameters():
            error = (found[name] - parameter.grad).norm() / parameter.grad.norm().clamp(min=1e-6)
            assert error < 1e-4, (name, error)


KINDS = {
    "ulysses": lambda: context_parallel("ulysses"),
    "ring": lambda: context_parallel("ring"),
    "calibrate": calibration,
    "ddp": lambda: data_parallel(shard=False),
    "fsdp2": lambda: data_parallel(shard=True),
}

if __name__ == "__main__":
    dist.init_process_group("gloo")
    KINDS[sys.argv[1]]()
    # What uses the group goes before it, also models in reference cycles: else this process may abort on its way out.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
