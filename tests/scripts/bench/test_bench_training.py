"""scripts.bench.training: on small models; the real sizes need a GPU."""

import json

import pytest
import torch

from scripts.bench import training as bench_training


@pytest.mark.parametrize("problem", bench_training.PROBLEMS)
def test_results_are_complete(problem, tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench_training.main([problem, "--tiny", "--rounds", "2", "--json", str(file)])
    results = json.loads(file.read_text())
    assert [result["name"] for result in results] == ["sdpa", "4-bit"]
    for result in results:
        low, median, high = result["seconds"]
        assert 0 < low <= median <= high
        assert (result["problem"], result["torch"], result["tiny"]) == (problem, torch.__version__, True)
    assert "x the time" in capsys.readouterr().out


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    problem = bench_training.qwen3_lora("cpu", True)
    monkeypatch.setitem(bench_training.PROBLEMS, "qwen3-14b-lora", lambda device, tiny: problem)
    monkeypatch.setattr(bench_training, "LOSSES_AGREE", 1e-9)
    with pytest.raises(SystemExit, match="losses: expected a difference.*nothing timed"):
        bench_training.main(["qwen3-14b-lora"])
    bench_training.qat_patch.unpatch_model(problem.model)
    broken = problem._replace(loss=lambda: problem.loss() * torch.nan)
    monkeypatch.setitem(bench_training.PROBLEMS, "qwen3-14b-lora", lambda device, tiny: broken)
    with pytest.raises(SystemExit, match="sdpa: .* gradients are not finite; nothing timed"):
        bench_training.main(["qwen3-14b-lora"])
    assert "x the time" not in capsys.readouterr().out
