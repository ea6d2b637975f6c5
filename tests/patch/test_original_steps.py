"""handle.original_steps: the first and last denoising steps of a pipeline in original attention."""

import itertools

import pytest
import torch

from qat_patch import patch_model
from support.models.lively_wan import LAYERS, processors, sample, tiny_wan_pipeline

pytestmark = pytest.mark.usefixtures("default_backend_stays")


@pytest.fixture
def steps_in_4_bits(calls):
    """Runs a pipeline and returns which of its steps ran 4-bit attention."""

    def run(pipe, callback, steps=5):
        counts = [len(calls)]

        def count(*args):
            counts.append(len(calls))
            return callback(*args)

        sample(pipe, steps=steps, callback=count)
        return [step for step, (a, b) in enumerate(itertools.pairwise(counts)) if b > a]

    return run


@pytest.mark.parametrize(
    ("first", "last", "two_transformers", "expected"),
    [(2, 1, False, [2, 3]), (1, 2, True, [1, 2]), (0, 2, False, [0, 1, 2]), (4, 0, False, [4]), (0, 0, False, [0, 1, 2, 3, 4])],
)
def test_original_steps(first, last, two_transformers, expected, steps_in_4_bits):
    pipe = tiny_wan_pipeline(two_transformers=two_transformers)
    handle = patch_model(pipe)
    with handle.original_steps(first=first, last=last) as callback:
        assert steps_in_4_bits(pipe, callback) == expected
        assert steps_in_4_bits(pipe, callback) == expected  # a second call of the pipeline begins again
    assert all(layer.enabled for layer in handle.patched.values())
    assert steps_in_4_bits(pipe, lambda pipe, step, timestep, tensors: tensors) == [0, 1, 2, 3, 4]


def test_original_steps_give_the_original_numbers():
    pipe = tiny_wan_pipeline()
    seen = {}

    def latents_after_step(name, callback=lambda pipe, step, timestep, tensors: tensors):
        def keep(pipe, step, timestep, tensors):
            seen[name, step] = tensors["latents"].clone()
            return callback(pipe, step, timestep, tensors)

        sample(pipe, steps=4, callback=keep)

    latents_after_step("stock")
    handle = patch_model(pipe)
    latents_after_step("patched")
    with handle.original_steps(first=2) as callback:
        latents_after_step("mixed", callback)
    assert torch.equal(seen["mixed", 1], seen["stock", 1])
    assert not torch.equal(seen["mixed", 2], seen["stock", 2])
    assert not torch.equal(seen["patched", 0], seen["stock", 0])


def test_original_steps_leave_the_state_as_it_was(steps_in_4_bits):
    pipe = tiny_wan_pipeline()
    stock = processors(pipe.transformer)
    handle = patch_model(pipe)

    def ours():
        return [layer.enabled for layer in handle.patched.values()] == [True] * (2 * LAYERS) and not any(
            processor is stock[name] for name, processor in processors(pipe.transformer).items()
        )

    with pytest.raises(RuntimeError, match="in the middle"), handle.original_steps(first=1):
        assert not ours()
        raise RuntimeError("in the middle")
    assert ours()
    with handle.disabled(), handle.original_steps(first=1) as callback:
        assert steps_in_4_bits(pipe, callback) == []
    assert ours()
    too_many = pytest.raises(ValueError, match="expected fewer than the 3 steps of this call, got first=2 and last=1")
    with too_many, handle.original_steps(first=2, last=1) as callback:
        steps_in_4_bits(pipe, callback, steps=3)
    assert ours()
    with pytest.raises(ValueError, match="the callback was not called"), handle.original_steps(first=1):
        sample(pipe)
    assert ours()
    for numbers in ({"first": -1}, {"last": -2}, {"first": 1.5}):
        with pytest.raises(ValueError, match="expected numbers of steps from 0 up"), handle.original_steps(**numbers):
            raise AssertionError("must not get here")
