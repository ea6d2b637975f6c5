"""Flow matching: noise levels, noisy clips and what is measured on held-out ones."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from qat_recipes.data.video import EncodedClips
from qat_recipes.tasks.flow_matching import FlowMatching, HeldOutClips, TimestepSettings, noise_levels
from support.models.tiny_clips import batch, objective, write_clips


def test_noise_levels_are_those_of_the_scheduler():
    euler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    sigmas, steps = noise_levels(dict(euler.config) | {"_class_name": "FlowMatchEulerDiscreteScheduler"}, None)
    assert torch.equal(sigmas, euler.sigmas) and torch.equal(sigmas * steps, euler.timesteps)
    # What Wan comes with knows its levels only once it is to sample; then it ends one level short of the last.
    unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    unipc.set_timesteps(1000)
    sigmas, steps = noise_levels(dict(unipc.config) | {"_class_name": "UniPCMultistepScheduler"}, None)
    assert len(sigmas) == steps == 1000 and sigmas[0] == 1
    assert torch.allclose(sigmas, unipc.sigmas[:1000], atol=4e-3)
    assert torch.allclose(sigmas * steps, unipc.timesteps.float(), atol=4)
    even, _ = noise_levels(None, 1.0)
    assert torch.allclose(even, torch.linspace(1, 0.001, 1000))
    assert not torch.allclose(sigmas, even, atol=0.2)


def test_noisy_clips_lie_between_clips_and_noise():
    flow, clips = objective(), batch(count=64)
    inputs = flow.inputs(clips)
    sigmas, noisy = inputs.sigmas, inputs.arguments["hidden_states"]
    noise = inputs.velocity + clips["latents"]
    assert torch.allclose(noisy, (1 - sigmas) * clips["latents"] + sigmas * noise, atol=1e-6)
    assert noise.mean().abs() < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
    assert torch.equal(inputs.arguments["timestep"], sigmas.flatten() * 1000)
    exact = flow.loss(inputs.velocity, inputs)
    assert exact == 0 and flow.loss(inputs.velocity + 2, inputs).item() == pytest.approx(4)
    # Evenly over the schedule unless told otherwise, and again the same from the same state of the generator.
    torch.manual_seed(0)
    drawn = flow.inputs(batch(count=500)).sigmas.flatten()
    assert (drawn > flow.sigmas[500]).float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.manual_seed(0)
    assert torch.equal(flow.inputs(batch(count=500)).sigmas.flatten(), drawn)
    low = FlowMatching(TimestepSettings(weighting_scheme="logit_normal", logit_mean=2.0), flow.sigmas, 1000)
    assert low.inputs(batch(count=500)).sigmas.mean() < drawn.mean() - 0.1
    weighted = FlowMatching(TimestepSettings(weighting_scheme="sigma_sqrt"), flow.sigmas, 1000)
    by_hand = (4 / inputs.sigmas.square()).mean().item()
    assert weighted.loss(inputs.velocity + 2, inputs).item() == pytest.approx(by_hand, rel=1e-5)


def test_held_out_clips_are_spread_over_the_schedule(tmp_path):
    write_clips(tmp_path, 2)
    held_out = HeldOutClips(EncodedClips(tmp_path), 4, seed=0)
    samples = [held_out[index] for index in range(len(held_out))]
    assert [sample["position"].item() for sample in samples] == [0.125, 0.375, 0.625, 0.875] * 2
    assert all(torch.equal(sample["noise"], held_out[index]["noise"]) for index, sample in enumerate(samples))
    assert len({sample["noise"].sum().item() for sample in samples}) == 8
