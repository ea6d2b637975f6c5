"""A step of the experiments as a CUDA graph: it asks the device nothing, and replayed steps are ordinary ones."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qat_recipes.training.settings import TrainingSettings
from scripts.evidence import fine_tuning
from scripts.evidence.attention.by_name import attention_in
from scripts.evidence.trained import ALL
from support.models.tiny_qwen3 import tiny_llama


class Asked(TorchDispatchMode):
    """Which operations wait for the device, or copy a number of the host to it. A capture allows neither."""

    WAITING = ("_local_scalar_dense", "aten.equal.", "nonzero", "masked_select", "lift_fresh", "unique", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        by_mask = str(function).startswith("aten.index") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if by_mask or any(name in str(function) for name in self.WAITING):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def asked_by_a_step(attention: str, distillation: float, window) -> list[str]:
    model, ids = tiny_llama().requires_grad_(True).train(), torch.arange(96).view(2, 48)
    teacher = fine_tuning.frozen_teacher(tiny_llama().eval().requires_grad_(False)) if distillation else None
    with attention_in(model, attention, [{"input_ids": ids}]), window(), Asked() as asked:
        values = fine_tuning.losses(fine_tuning.OBJECTIVE, model, {"input_ids": ids}, teacher, distillation)
        values["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return asked.found


@pytest.mark.parametrize("attention", ["original", ALL, "public_training"])
def test_a_step_asks_the_device_nothing(attention, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not asked_by_a_step(attention, 0.5, fine_tuning.whole_windows)
    monkeypatch.undo()
    assert asked_by_a_step(attention, 0.0, contextlib.nullcontext), "transformers looks for several texts in a row"


def test_learning_rates_are_those_of_the_schedule():
    settings = TrainingSettings(output_dir="", steps=4, batch_size=1, learning_rate=1.0, schedule="cosine", warmup_steps=2)
    assert fine_tuning.learning_rates(settings).tolist() == pytest.approx([0.0, 0.5, 1.0, 0.5])


@pytest.mark.gpu
@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_replayed_steps_are_ordinary_ones_to_the_bit(distillation, monkeypatch):
    windows = torch.randint(0, 100, (16, 96), generator=torch.Generator().manual_seed(0)).cuda()

    def trained() -> tuple[dict, list[torch.Tensor]]:
        model, start = (tiny_llama().cuda().requires_grad_(required) for required in (True, False))
        settings = TrainingSettings(
            output_dir="",
            steps=8,
            batch_size=2,
            learning_rate=1e-3,
            schedule="cosine",
            fused_optimizer=True,
            mixed_precision="bf16",
            eval_every=3,
            distillation=distillation,
        )
        teacher = fine_tuning.frozen_teacher(start.eval()) if distillation else None

        def measure() -> dict[str, float]:
            measured = fine_tuning.measure_windows(
                model, {"fp4": contextlib.nullcontext}, windows[:4], fine_tuning.frozen_teacher(start), settings, 2
            )
            return fine_tuning.means(measured)

        with attention_in(model, ALL, [{"input_ids": windows[:2]}]):
            entry = fine_tuning.fine_tune(model, settings, windows, teacher=teacher, measure=measure)
        return entry, [*model.parameters()]

    replayed, weights = trained()
    monkeypatch.setattr(fine_tuning, "WARM_UP", 99)
    eager, expected = trained()
    assert replayed == eager and all(torch.equal(x, y) for x, y in zip(weights, expected, strict=True))
