"""`disabled()`, `observed()` and `original_steps()` that overlap: they hold for the model, count, and end in any order."""

import asyncio
import contextlib
import copy
import gc
import pickle
import threading

import pytest
import torch

from qat_patch import calibrate, get_handle, patch_model, sensitivity, unpatch_model
from support.models.lively_wan import processors, same_objects, sample, tiny_wan, tiny_wan_pipeline, velocity
from support.models.tiny_qwen3 import logits, tiny_qwen3, token_ids


class Tried:
    """A patched model, and which attention it runs now."""

    def __init__(self, build):
        self.model, self.build = build(), build
        self.original = self.run()
        self.handle = patch_model(self.model)
        self.quantized = self.run()
        assert not torch.equal(self.original, self.quantized)

    def run(self):
        return velocity(self.model) if self.build is tiny_wan else logits(self.model, token_ids())

    @property
    def is_original(self):
        out = self.run()
        assert torch.equal(out, self.original) or torch.equal(out, self.quantized)
        return torch.equal(out, self.original)


@pytest.fixture(params=[tiny_qwen3, tiny_wan], ids=["transformers", "diffusers"])
def tried(request):
    return Tried(request.param)


def test_generators_that_are_left_open(tried):
    def request():
        with tried.handle.disabled():
            yield
            yield

    first, second = request(), request()
    next(first), next(second)
    first.close()
    assert tried.is_original  # the second one is still inside
    del second
    gc.collect()
    assert not tried.is_original


def test_tasks_that_end_in_another_order(tried):
    async def request(inside, leave):
        with tried.handle.disabled():
            inside.set()
            await leave.wait()
            return tried.is_original

    async def both():
        events = [asyncio.Event() for _ in range(4)]
        tasks = [asyncio.create_task(request(*events[:2])), asyncio.create_task(request(*events[2:]))]
        await events[0].wait(), await events[2].wait()
        events[1].set()
        first = await tasks[0]
        events[3].set()
        return first, await tasks[1]

    assert asyncio.run(both()) == (True, True)
    assert not tried.is_original


def test_threads_that_switch_at_once(tried):
    start, failures = threading.Barrier(4), []

    def work():
        start.wait()
        for _ in range(50):
            with tried.handle.disabled():
                if any(layer.enabled for layer in tried.handle.patched.values()):
                    failures.append("enabled inside")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and not tried.is_original
    assert all(layer.off == 0 for layer in tried.handle.patched.values())


def test_a_measurement_and_disabled_end_in_any_order(tried):
    for order in ((0, 1), (1, 0)):
        stacks, seen = [contextlib.ExitStack(), contextlib.ExitStack()], []
        stacks[0].enter_context(tried.handle.observed(lambda layer, call, seen=seen: seen.append(layer)))
        stacks[1].enter_context(tried.handle.disabled())
        assert tried.is_original and len(seen) == len(tried.handle.patched)
        stacks[order[0]].close()
        assert tried.is_original
        assert len(seen) == len(tried.handle.patched) * (1 if order[0] == 0 else 2)
        stacks[order[1]].close()
        assert not tried.is_original


def test_a_model_is_observed_by_one_measurement_at_a_time(tried):
    seen = []
    with tried.handle.observed(lambda layer, call: seen.append(layer)):
        for measure in (calibrate, sensitivity):
            with pytest.raises(ValueError, match="observed: expected a model that is not observed yet, got one that is"):
                measure(tried.model, [token_ids()])
        tried.run()
    assert len(seen) == len(tried.handle.patched) and tried.handle.k_shift == {}
    assert not tried.is_original


def test_copies_are_made_outside(tried):
    for context in (tried.handle.disabled(), tried.handle.observed(print)):
        with context:
            for copied in (copy.deepcopy, pickle.dumps):
                with pytest.raises(ValueError, match="expected to be copied or pickled with 4-bit attention in force"):
                    copied(tried.model)
    assert not tried.is_original
    assert get_handle(copy.deepcopy(tried.model)).patched.keys() == tried.handle.patched.keys()


def test_an_exception_and_an_unpatched_model(tried):
    with pytest.raises(RuntimeError, match="inside"), tried.handle.disabled(), tried.handle.disabled():
        raise RuntimeError("inside")
    assert not tried.is_original
    with tried.handle.disabled():
        unpatch_model(tried.model)
        again = patch_model(tried.model)
        assert not tried.is_original  # the new patch knows nothing of the old handle
    assert get_handle(tried.model) is again and not tried.is_original


def test_a_processor_that_is_set_inside_disabled_is_not_taken_away():
    model = tiny_wan()
    stock = processors(model)
    handle = patch_model(model)
    own = type(stock["blocks.0.attn1"])()
    with handle.disabled():
        model.blocks[0].attn1.set_processor(own)
    assert model.blocks[0].attn1.processor is own and str(handle).count("LOST") == 1
    unpatch_model(model)
    assert same_objects(processors(model), stock)


def test_original_steps_of_two_runs_that_overlap():
    """A step is original while either of them says so, and 4-bit attention is back when both have ended."""
    pipe = tiny_wan_pipeline()
    handle = patch_model(pipe)
    layers = handle.patched.values()
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    callbacks = [stack.enter_context(handle.original_steps(first=1)) for stack in (first, second)]
    sample(pipe, callback=callbacks[0])
    assert all(layer.off == 2 for layer in layers)  # the first has ended its run, and waits for another
    first.close()
    assert all(layer.off == 1 for layer in layers)
    sample(pipe, callback=callbacks[1])
    with handle.disabled():
        second.close()
        assert all(layer.off == 1 for layer in layers)
    assert all(layer.enabled for layer in layers)
