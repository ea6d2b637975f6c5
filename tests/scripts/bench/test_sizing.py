"""scripts.bench.sizing and docs/SIZING.md: what is measured is the recipes' step, and the table is what was measured."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from scripts.bench import sizing, sizing_cases, sizing_report
from scripts.bench.sizing_report import STATIC, Line, fit, report

GIB = 2**30


ON_A_GPU = {name for name in sizing_cases.METHODS if "activations" in name or "paged" in name}
OF = dict.fromkeys(sizing_cases.METHODS, "Qwen3 tiny") | dict.fromkeys(
    ("full", "LoRA", "LoRA, layers", "LoRA, NF4"), "Wan 2.1 tiny"
)
OF |= {name: "Wan 2.2 tiny" for name in OF if "expert" in name}


def test_every_method_runs_and_a_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sizing_cases.MeasuredVideo, "sample", small_clip)
    every = sizing_cases.tiny_cases((32, 48))
    assert {case.method for case in every} | ON_A_GPU == sizing_cases.METHODS.keys()
    # Each once; of Wan those whose losses are compared.
    file, cases = tmp_path / "memory.json", [case for case in every if case.model == OF[case.method]]
    sizing.measure(file, sizing_cases.TINY, cases[:1], seconds=1e9)
    first = json.loads(file.read_text())
    assert [(case["model"], case["method"]) for case in first["cases"]] == [(cases[0].model, cases[0].method)]
    sizing.measure(file, sizing_cases.TINY, cases, seconds=0)
    assert json.loads(file.read_text()) == first and "run it again for the rest" in capsys.readouterr().out
    sizing.measure(file, sizing_cases.TINY, cases, seconds=1e9)
    results = json.loads(file.read_text())
    assert [(case["model"], case["method"], case["tokens"]) for case in results["cases"]] == [
        (case.model, case.method, [32, 48]) for case in cases
    ]
    assert all(math.isfinite(loss) for case in results["cases"] for loss in case["losses"])
    losses = {(case["model"], case["method"]): case["losses"] for case in results["cases"]}
    # Random numbers are the same, and frozen weights are not.
    assert losses["Wan 2.1 tiny", "LoRA"] == losses["Wan 2.1 tiny", "LoRA, layers"] != losses["Wan 2.1 tiny", "LoRA, NF4"]
    assert "LoRA: 32: ran, not measured on a CPU, 48: ran" in capsys.readouterr().out
    # Nothing is left to do.
    sizing.measure(file, sizing_cases.TINY, cases, seconds=0)
    assert json.loads(file.read_text()) == results
    with pytest.raises(ValueError, match="expected lengths of which memory was measured, on a GPU, got none"):
        report(file)
    monkeypatch.setattr(sizing, "machine", lambda: {"device": "another"})
    with pytest.raises(ValueError, match=r"measured on .*CPU.*, and this is .*another"):
        sizing.measure(file, sizing_cases.TINY, cases, seconds=0)


def test_what_cannot_be_measured_is_reported_at_the_end(tmp_path, monkeypatch, capsys):
    def train(settings, make_task):
        if settings.lora is None:
            raise FloatingPointError("the loss is not finite")

    monkeypatch.setattr(sizing, "train", train)
    cases = [sizing_cases.Case(model="Qwen3 tiny", method=method, tokens=(16, 32)) for method in ("full", "LoRA")]
    with pytest.raises(SystemExit, match="not measured: Qwen3 tiny, full$"):
        sizing.measure(tmp_path / "memory.json", sizing_cases.TINY, cases, seconds=1e9)
    assert "full: not measured: FloatingPointError: the loss is not finite" in capsys.readouterr().out
    (case,) = json.loads((tmp_path / "memory.json").read_text())["cases"]
    assert case["method"] == "LoRA" and case["peak_bytes"] == case["losses"] == [None, None]


def small_clip(self, tokens):
    return {"latents": torch.randn(16, tokens // 16, 8, 8), "prompt_embeds": torch.randn(512, self.config["text_dim"])}


def test_what_is_measured_is_the_peak_of_each_length(monkeypatch):
    """Not of the first step, in which optimizer states are still missing; and lengths that do not fit are none."""
    limits = []
    cuda = sizing.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: limits.append("peaks start"))
    monkeypatch.setattr(cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=32 * GIB))
    monkeypatch.setattr(cuda, "set_per_process_memory_fraction", limits.append)
    written = 3

    def train(settings, make_task):
        assert settings.steps == 5 and settings.mixed_precision == "bf16" and settings.load_dtype == torch.bfloat16
        assert limits == ["peaks start", 0.75]
        with open(f"{settings.output_dir}/metrics.jsonl", "w") as log:
            for step, peak in enumerate((1.0, 2.0, 3.5, 4, 4)[:written], 1):
                record = {"step": step, "peak_memory_gib": peak, "reserved_gib": 5, "loss": 2 * peak, "tokens_per_second": 12}
                print(json.dumps(record), file=log)
        if written < 5:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(sizing, "train", train)
    case = sizing_cases.Case(model="Qwen3 tiny", method="LoRA", tokens=(16, 32, 48), cap_gib=24, is_timed=True)
    model = sizing_cases.TINY[case.model]
    assert sizing.measured(case, model) == {
        "peak_bytes": [2 * GIB, round(3.5 * GIB), None],
        "reserved_bytes": [5 * GIB, 5 * GIB, None],
        "losses": [4, 7, None],
        "seconds": None,
    }
    assert limits.pop() == 1
    limits.clear()
    written = 5
    assert sizing.measured(case, model)["seconds"] == 4


@pytest.mark.gpu
def test_the_allocator_gets_no_more_than_its_limit():
    with sizing.memory_limited(1), pytest.raises(torch.OutOfMemoryError):
        torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")


def test_weights_are_those_of_the_published_models():
    # The numbers of parameters in the files on the Hub.
    published = {"Wan 2.1 1.3B": 1_418_996_800, "Qwen3 0.6B": 596_049_920, "Qwen3 14B": 14_768_307_200}
    assert {name: sizing.weights(sizing_cases.MODELS[name]) for name in published} == published


def case(model="Qwen3 4B", method="full", tokens=(4096, 8192, 16_384), peaks=(20, 30, 50)):
    return {"model": model, "method": method, "tokens": tokens, "peak_bytes": [p and round(p * GIB) for p in peaks]}


def test_the_line():
    weights = GIB
    line = fit(case(), weights)
    assert line == Line(pytest.approx(10 * GIB), pytest.approx(10 * GIB / 4096), 16 * GIB, 16_384, 0)
    # Never less than the weights.
    assert line.bytes(1024) == 16 * GIB and line.bytes(32_768) == pytest.approx(90 * GIB)
    assert fit(case(peaks=(20, 33, 50)), weights).error == pytest.approx(1 - 30 / 33)
    assert fit(case(peaks=(20, 30, None)), weights).longest == 8192
    assert fit(case(peaks=(20, None, None)), weights) is None


def test_the_table(tmp_path):
    file = tmp_path / "h200_memory.json"
    weights = {"Wan 2.1 1.3B": 10**9, "Qwen3 4B": 10**9, "Qwen3 14B": 14 * 10**9}
    cases = [
        case(),
        case("Qwen3 14B", "LoRA", peaks=(30, 40, None)),
        case("Wan 2.1 1.3B", "LoRA", (7800, 17_160, 32_760), (10, 19.4, 35)),
    ]
    file.write_text(json.dumps({"about": {"device": "H200", "torch": "2"}, "weights": weights, "cases": cases}))
    text = report(file)
    rows = {tuple(cells[:2]): cells[3:] for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 12}
    # 90 % of 24 GiB hold 10 + tokens / 409.6 GiB; what exceeds 16,384 tokens was not measured.
    assert rows["Qwen3 4B", "full"][:2] == ["-", "-"]
    assert rows["Qwen3 4B", "full"][2:6] == ["4,096", "7,168", "13,312", "~24,576"]
    assert rows["Qwen3 4B", "full"][-1] == "~32,768"
    # 2.5 times 8,192, and no further.
    assert rows["Qwen3 14B", "LoRA"] == ["-"] * 3 + ["3,072", "~9,216", "~20,480", *["~20,480"] * 3]
    assert rows["Qwen3 14B", "full"] == ["-"] * 9 and rows["Wan 2.1 1.3B", "full"] == ["-", "-", *["?"] * 7]
    # 1,560 tokens a latent frame of 480p, 3,600 of 720p; 480p x 81 frames was measured.
    assert rows["Wan 2.1 1.3B", "LoRA"][2] == "45 / 17" and rows["Wan 2.1 1.3B", "LoRA"][5:] == [
        "81 / ~73",
        "81 / ~81",
        "81 / ~81",
        "81 / ~81",
    ]
    assert "8,192: 40.00; 16,384: does not fit" in text and "device H200, torch 2" in text


def test_small_gpus_have_a_section(tmp_path):
    capped = case("Wan 2.1 14B", "LoRA, NF4, activations", (7800, 32_760), (10, 20)) | {"cap_gib": 24, "seconds": 14.26}
    capped["reserved_bytes"] = [11 * GIB, 23 * GIB]
    too_large = capped | {
        "method": "LoRA, float8, activations",
        "peak_bytes": [12 * GIB, None],
        "reserved_bytes": [13 * GIB, None],
    }
    file = tmp_path / "h200_memory.json"
    weights = {"Wan 2.1 14B": 14 * 10**9, "Wan 2.2 A14B": 28 * 10**9}
    cases = [capped, too_large | {"seconds": None}]
    file.write_text(json.dumps({"about": {"device": "H200"}, "weights": weights, "cases": cases}))
    text = report(file)
    assert "| Wan 2.1 14B | LoRA, NF4, activations | 24 | 7,800: 10.00; 32,760: 20.00 | 23.00 | 14.3 |" in text
    assert "| Wan 2.1 14B | LoRA, float8, activations | 24 | 7,800: 12.00; 32,760: does not fit | 13.00 |  |" in text
    # 90 % of 24 GiB hold all 81 frames of 480p; of the other no line is known.
    assert "| Wan 2.1 14B | LoRA, NF4, activations | 14.00 G | - / - | 45 / 17 | 81 / ~37 |" in text
    assert "LoRA, float8, activations | 14.00 G" not in text and "Wan 2.2 A14B" not in text and "## 4. Measured" in text


def test_the_methods_have_names():
    assert sizing_cases.METHODS.keys() == STATIC.keys() and {case.method for case in sizing_cases.CASES} <= STATIC.keys()
    assert {case.model for case in sizing_cases.CASES} <= sizing_cases.MODELS.keys()


def test_there_is_one_file_of_memory(tmp_path, monkeypatch):
    """That docs/SIZING.md is written from it is tested with the other documents."""
    assert sizing_report.measured().name.endswith("_memory.json")
    monkeypatch.setattr(sizing_report, "DOCS", tmp_path)
    with pytest.raises(ValueError, match="expected one .*, got none"):
        sizing_report.measured()
