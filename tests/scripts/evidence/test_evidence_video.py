"""The experiments on video, at a size of seconds: what they draw, hold out, measure and choose."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from scripts.evidence import video, video_experiments
from scripts.evidence.report import video as report_video
from scripts.evidence.video_experiments import Experiment, Extent, Run, best_rate, motion, next_rates, plan_trained, tried_rates

SIZE = video.Size(frames=4, height=16, width=24, layers=2, heads=2, head_dim=16, ffn_dim=32, steps=3, batch=2)
EXTENT = Extent(steps=2, batch=2, timesteps=2, noises=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    generator = torch.Generator().manual_seed(0)
    shape = (16 + video.MARGIN[0], 24 + video.MARGIN[1], 3)
    clips = {name: torch.randint(256, (frames, *shape), generator=generator) for name, frames in (("a", 20), ("b", 70))}
    save_file({name: x.to(torch.uint8) for name, x in clips.items()}, folder / "clips.safetensors")
    video.pretrain(folder, SIZE, CPU)
    return folder


@pytest.fixture(scope="module")
def experiment(folder):
    return Experiment(folder, SIZE, EXTENT, CPU)


def test_splits_share_no_frame(experiment):
    frames = {
        split: {(number, first + offset) for number, first in experiment.clips.windows(split) for offset in range(SIZE.frames)}
        for split in video.SPLITS
    }
    assert all(frames.values())
    assert not frames["train"] & frames["validation"] and not (frames["train"] | frames["validation"]) & frames["test"]
    assert max(frame for number, frame in frames["test"] if number == 1) <= 69


def test_batches_follow_from_the_seed(experiment):
    def two(seed):
        return list(experiment.clips.batches(seed, 2, 3))

    first, again, other = two(1), two(1), two(2)
    for name in first[0]:
        assert torch.equal(first[1][name], again[1][name])
        assert not torch.equal(first[0][name], first[1][name]) or name == "prompt_embeds"
    assert not torch.equal(first[0]["noise"], other[0]["noise"]) and not torch.equal(first[0]["latents"], other[0]["latents"])
    assert first[0]["latents"].shape == (3, *SIZE.latents)


def test_motion_sees_what_moves_and_not_what_flickers():
    still = torch.rand(1, 1, 16, 24, 3).expand(1, 4, 16, 24, 3)
    ramp = torch.arange(4.0).view(1, 4, 1, 1, 1) / 10
    assert motion(still) == [0]
    assert motion(still * 0 + ramp) == pytest.approx([0.1])
    # A pattern of pixels that inverts from frame to frame.
    board = ((torch.arange(16)[:, None] + torch.arange(24)) % 2).view(1, 1, 16, 24, 1).float()
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1, 1)
    assert motion(((board - 0.5) * sign).expand(1, 4, 16, 24, 3)) == pytest.approx([0], abs=1e-6)


def test_untrained_measures_the_start_against_itself_and_4_bits_against_it(experiment):
    before = copy.deepcopy(experiment.start.state_dict())
    original = experiment("original")["test"]
    assert set(original["velocity_error"]) == {0} and set(original["psnr"]) == {100} and set(original["ssim"]) == {1}
    items, samples = len(experiment.clips.windows("test")) * EXTENT.timesteps, 2 * EXTENT.noises
    for name in ("nvfp4", "sage3", video_experiments.ALL):
        found = experiment(name)["test"]
        assert len(found["loss"]) == len(found["velocity_error"]) == items and len(found["motion"]) == samples
        assert min(found["velocity_error"]) > 0 and max(found["psnr"]) < 100 and found["loss"] != original["loss"]
    assert experiment("original")["test"] == original
    assert all(torch.equal(x, experiment.start.state_dict()[name]) for name, x in before.items())
    # Held-out losses are of the velocity: those of a model that says nothing are the power of noise - latents.
    inputs = video.OBJECTIVE.inputs(experiment.held_out["test"][0])
    with torch.no_grad():
        outputs = video.OBJECTIVE.outputs(experiment.start, inputs)
    expected = (outputs - inputs.velocity).square().mean((1, 2, 3, 4))
    assert original["loss"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_runs_learn_what_their_method_says(experiment):
    runs = {method: experiment(Run(method=method, rate=1e-2, seed=0)) for method in video_experiments.METHODS}
    assert set(runs["control"]["test"]) == {"original", "nvfp4"} and set(runs["task"]["test"]) == {"nvfp4"}
    # At the first step the model is still the start: in original attention, and through 4 bits only distillation is near zero.
    assert 0 < runs["distill"]["loss"][0] < 0.1 * runs["task"]["loss"][0]
    assert runs["mix"]["loss"][0] == pytest.approx((runs["task"]["loss"][0] + runs["distill"]["loss"][0]) / 2, rel=1e-3)
    assert runs["task"]["loss"][0] != runs["control"]["loss"][0]
    again = experiment(Run(method="task", rate=1e-2, seed=0))
    assert again == runs["task"]
    assert experiment(Run(method="task", rate=1e-2, seed=1))["loss"] != again["loss"]


def entry(loss, error=0.0):
    return {"validation": {"loss": [loss, loss], "velocity_error": [error, error]}}


def test_a_sweep_goes_on_until_both_neighbours_are_worse():
    results = {}

    def reached(method, values):
        for rate in next_rates(tried_rates(results, method)):
            results[Run(method=method, rate=rate, seed=0).key] = entry(*values(rate))

    for _ in range(4):
        reached("task", lambda rate: (abs(rate - 3e-4), 0))
        # Only the distance counts.
        reached("distill", lambda rate: (-rate, rate))
    assert best_rate(results, "task") == 3e-4 and best_rate(results, "distill") == 3e-6
    assert set(tried_rates(results, "task")) == {3e-5, 1e-4, 3e-4, 1e-3}
    results[Run(method="control", rate=3e-5, seed=0).key] = entry(float("nan"))
    assert best_rate(results, "control") is None
    planned = dict(plan_trained(results))
    seeds = {run.seed for run in planned.values() if run.method == "task" and run.rate == 3e-4}
    assert seeds == {0, 1, 2}
    assert not [run for run in planned.values() if run.method == "control" and run.seed]


def test_what_is_missing_is_reported(tmp_path):
    with pytest.raises(ValueError, match="expected prepared clips"):
        video.Clips(tmp_path, SIZE, CPU)
    with pytest.raises(ValueError, match="expected a pretrained model"):
        video.load_start(tmp_path, CPU)


def measured(loss, velocity_error, psnr, move):
    return {"loss": loss, "velocity_error": velocity_error, "psnr": psnr, "ssim": [1.0, 1.0], "motion": move}


MACHINE = {"machine": {"device": "a GPU", "torch": "2"}}
START = measured([1.0, 3.0], [0.0, 0.0], [100.0, 100.0], [0.1, 0.3])
WORSE = measured([1.5, 3.7], [0.2, 0.4], [20.0, 30.0], [0.05, 0.15])
UNTRAINED = {
    "clips": {"motion": {"train": [0.1, 0.5]}} | MACHINE,
    "nvfp4": {"test": WORSE} | MACHINE,
    "original": {"test": START} | MACHINE,
    "v_only": {"test": WORSE | {"velocity_error": [0.01, 0.01]}} | MACHINE,
}


def run(method, rate, seed, **losses):
    settings = {"method": method, "attention": "nvfp4", "rate": rate, "seed": seed}
    return {"settings": settings, "test": {name: WORSE | {"loss": [x, x]} for name, x in losses.items()}} | MACHINE


def test_the_report_compares_pairs():
    rows = report_video.untrained_rows(UNTRAINED)
    assert list(rows) == ["original", "v_only", "nvfp4"]
    # Errors are those of the differences, 0.5 and 0.7; and half as much moves in both samples.
    extra, velocity, psnr, ssim, motion = rows["nvfp4"].values()
    assert extra == pytest.approx((600, 100)) and velocity == pytest.approx((300, 100)) and psnr == pytest.approx((25, 5))
    assert ssim == (1, 0) and motion == pytest.approx((0.5, 0))


def test_the_report_takes_the_rate_with_most_seeds_and_the_control_of_the_same_seed(tmp_path):
    trained = {
        "a": run("task", 1e-3, 0, nvfp4=9.0),
        "b": run("task", 1e-4, 0, nvfp4=2.0),
        "c": run("task", 1e-4, 1, nvfp4=2.4),
    }
    assert report_video.trained_rows(UNTRAINED, trained) == {}
    trained |= {f"d{seed}": run("control", 1e-4, seed, original=1.9, nvfp4=2.2) for seed in (0, 1)}
    rows = report_video.trained_rows(UNTRAINED, trained)
    assert list(rows) == [
        "task at 0.0001, in `nvfp4`, seeds: 2",
        "control at 0.0001, in `original`, seeds: 2",
        "control at 0.0001, in `nvfp4`, seeds: 2",
    ]
    extra = [row["extra loss, 10⁻³"] for row in rows.values()]
    assert extra[0] == pytest.approx((300, 200)) and extra[1] == (0, 0) and extra[2] == pytest.approx((300, 0))
    # Distillation is compared with the starting model, whose losses are 1 and 3; a mix without its control is left out.
    more = {"e": run("distill", 1e-4, 0, nvfp4=2.5), "f": run("mix", 1e-4, 0, nvfp4=2.5)}
    name, *others = report_video.trained_rows(UNTRAINED, trained | more)
    assert name.startswith("distill at 0.0001") and others == list(rows)
    assert report_video.trained_rows(UNTRAINED, more)[name]["extra loss, 10⁻³"].mean == pytest.approx(500)

    results = {"video_untrained": UNTRAINED, "video_trained": trained}
    texts = {name: make(results.get) for name, make in report_video.TABLES.items()}
    assert "| task at 0.0001, in `nvfp4`, seeds: 2 | 300.00 ± 200.00 | 300.00 ± 100.00 | 25.0 ± 5.0 |" in texts["video-trained"]
    assert "| clips, train | 0.30000 | 1.500 |" in texts["video-motion"] and "a GPU" in texts["video-untrained"]
    report_video.FIGURES["video"](results.get, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_without_results_the_report_says_nothing(tmp_path):
    nothing = {"video_untrained": {}, "video_trained": {}}
    assert {make(nothing.get) for make in report_video.TABLES.values()} == {""}
    report_video.FIGURES["video"](nothing.get, tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
