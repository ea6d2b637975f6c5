"""Experiment 1 on a tiny language model: what is stored, what is skipped, and the table."""

import json

import pytest
import torch
from safetensors.torch import save_file

from scripts.evidence import untrained
from scripts.evidence.language import SPLITS
from scripts.evidence.results import Results
from support.models.tiny_qwen3 import VOCAB, tiny_llama


@pytest.fixture
def folder(tmp_path):
    """A prepared folder, as language.py writes it: a model with peaky attention, one play for each split."""
    model = tiny_llama(layers=3)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 20
    model.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    tokens = {f"{split}/play": torch.randint(VOCAB, (600,), dtype=torch.int32, generator=generator) for split in SPLITS}
    save_file(tokens, tmp_path / "tokens.safetensors")
    return tmp_path


def run(folder, *arguments):
    file = folder / "untrained.json"
    options = ["--language", str(folder), "--results", str(file), "--device", "cpu", "--length", "144", "--windows", "4"]
    untrained.main([*options, "--batch", "3", *arguments])
    return Results(file)


def test_every_attention_is_measured_once(folder, capsys):
    results = run(folder)
    assert set(results) == set(untrained.ATTENTIONS)
    assert all(len(entry["loss"]) == len(entry["kl"]) == 4 for entry in results.values())
    assert max(map(abs, results["original"]["kl"])) < 1e-5
    for name in set(results) - {"original"}:
        assert min(results[name]["kl"]) > 1e-6, name
    assert len({json.dumps(entry["kl"]) for entry in results.values()}) == len(results)
    table = capsys.readouterr().out[-6000:]
    assert all(title in table for name, title in untrained.ATTENTIONS.items() if name != "original")
    before = results.file.read_text()
    run(folder)
    assert results.file.read_text() == before


def test_the_loss_is_that_of_the_model(folder):
    results = run(folder, "--seconds", "0.0001")  # stops after the first
    assert list(results) == ["original"]
    ids = untrained.Language(folder).windows("test", 144, 4)
    with torch.no_grad():
        for window, loss in zip(ids, results["original"]["loss"], strict=True):
            expected = untrained.Language(folder).model("cpu")(window[None], labels=window[None]).loss
            assert abs(loss - expected) < 1e-5


def test_the_table_pairs_windows():
    def entry(loss, kl):
        return {"loss": loss, "kl": kl, "settings": {"windows": 3, "length": 8}}

    results = {
        "original": entry([1.0, 5.0, 3.0], [0.0, 0.0, 0.0]),
        "nvfp4": entry([1.1, 5.2, 3.3], [0.1, 0.2, 0.3]),
        "sage3": entry([1.1, 5.1, 3.1], [0.2, 0.3, 0.4]),
    }
    table = untrained.table(results).splitlines()
    assert "3 x 8 tokens" in table[0]
    assert "(3.0000)" in table[0]
    # Mean .2, deviation .1 over 3 windows; the same tenth everywhere.
    assert table[2:] == [
        "| this definition | 0.2000 ± 0.0577 | 0.2000 ± 0.0577 |  |",
        "| SageAttention3's scheme | 0.1000 ± 0.0000 | 0.3000 ± 0.0577 | +0.1000 ± 0.0000 |",
    ]
