"""scripts.bench.training: on small models; the real sizes need a GPU."""

import json

import pytest
import torch
import transformers

from scripts.bench import training as bench_training


def test_results_are_complete(tmp_path, capsys):
    """Of all problems, which is the default."""
    file = tmp_path / "bench.json"
    bench_training.main(["--tiny", "--rounds", "2", "--json", str(file)])
    results = json.loads(file.read_text())
    names = ["sdpa", "4-bit", *(f"host, {name} {what}" for name in ("sdpa", "4-bit") for what in ("inference", "training"))]
    assert [(result["problem"], result["name"]) for result in results] == [(p, n) for p in bench_training.PROBLEMS for n in names]
    for result in results:
        low, median, high = result["seconds"]
        assert 0 < low <= median <= high
        assert (result["torch"], result["tiny"]) == (torch.__version__, True)
    printed = capsys.readouterr().out
    assert printed.count("x the time") == 4 and printed.count("host time of a call") == 4 * 4
    with pytest.raises(SystemExit):
        bench_training.main(["wan"])
    assert "PROBLEM: expected wan2.1-1.3b, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("problem", "config", "weights"),
    [
        ("smollm2-135m", "LlamaConfig", 134_515_008),
        ("qwen3-0.6b-lora", "Qwen3Config", 596_049_920),
        ("qwen3-14b-lora", "Qwen3Config", 14_768_307_200),
    ],
)
def test_real_sizes_have_the_published_number_of_weights(problem, config, weights, monkeypatch):
    """From the config alone: the model is made without memory."""
    made = {}

    def without_memory(config, **_):
        with torch.device("meta"):
            made["model"] = transformers.AutoModelForCausalLM._model_mapping[type(config)](config)
        raise InterruptedError

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_config", without_memory)
    with pytest.raises(InterruptedError):
        bench_training.PROBLEMS[problem]("meta", False)
    assert type(made["model"].config).__name__ == config
    assert sum(p.numel() for p in made["model"].parameters()) == weights


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    problem = bench_training.PROBLEMS["qwen3-14b-lora"]("cpu", True)
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
