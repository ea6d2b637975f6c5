"""qat-patch bench figure-5: numbers first, then speed, a table, a picture and a JSON."""

import json
import re

import pytest
import torch

import qat_kernels
from qat_patch.bench import figure_5
from qat_patch.cli import main
from support.kernels.interpreter import interpreted

SMALL = ["--length", "32", "16", "--head-dim", "16", "--batch=1", "--heads=1", "--rounds=2"]


def run(folder, *arguments):
    """The command, and what it printed to files in a folder; under the interpreter."""
    files = [f"--json={folder}/figure.json", f"--png={folder}/figure.png"]
    return main(["bench", "figure-5", *SMALL, *files, *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="more is measured there")
def test_the_figure_is_measured_drawn_and_written(tmp_path):
    assert interpreted(run, tmp_path) == 0
    results = json.loads((tmp_path / "figure.json").read_text())
    assert [(r["head_dim"], r["keys"]) for r in results[::3]] == [(16, 32), (16, 16)]
    assert {r["name"] for r in results} == {"fp4", "triton", "sdpa flash"}
    assert all(r["tflops"] > 0 and "emulated in BF16" in r["fp4"] and r["torch"] == torch.__version__ for r in results)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    header, _, first, *_ = figure_5.table(results).splitlines()
    assert header == "| head dim | tokens | fp4 | triton | sdpa flash |" and first.startswith("| 16 | 32 | ")


def wrong(folder):
    """As if the last shape came out wrong: nothing may be timed, the first neither."""
    right, timed = qat_kernels.attention, []

    def spoiled(q, k, v, **options):
        return right(q, k, v, **options) * (1.02 if q.dtype == torch.bfloat16 and q.shape[2] == 16 else 1)

    qat_kernels.attention = spoiled
    figure_5.timed, before = lambda *_: timed.append(1), figure_5.timed
    try:
        return run(folder), timed, (folder / "figure.json").exists()
    finally:
        qat_kernels.attention, figure_5.timed = right, before


def test_what_is_wrong_is_not_timed(tmp_path):
    assert interpreted(wrong, tmp_path) == (1, [], False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run there")
def test_it_says_what_it_needs(tmp_path, capsys, monkeypatch):
    assert run(tmp_path) == 1
    assert "bench figure-5: expected an NVIDIA GPU from sm_80 on, got none" in capsys.readouterr().err
    for arguments, words in (
        (["--rounds=0"], "expected numbers from 1 up"),
        ([f"--json={tmp_path}/none/x.json"], "in a folder that exists"),
    ):
        assert run(tmp_path, *arguments) == 1
        assert words in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(tmp_path) == 1
    assert re.search("needs matplotlib: pip install .*--no-png", capsys.readouterr().err)


def test_what_does_not_fit_is_left_out(monkeypatch, capsys):
    def out_of_memory(shape, *_):
        if shape.keys > 16:
            raise torch.OutOfMemoryError("x")

    monkeypatch.setattr(figure_5, "why_not", lambda *_: None)
    monkeypatch.setattr(figure_5, "check_all", out_of_memory)
    monkeypatch.setattr(figure_5, "timed", lambda *_: [{"name": "fp4", "seconds": [1.0, 2.0, 3.0]}])
    shapes = [figure_5.SHAPES[0]._replace(keys=n, queries=n) for n in (16, 32)]
    written = []
    (only,) = figure_5.figure_5(shapes, 1, written.append)
    assert only["keys"] == 16 and only["tflops"] == 4 * 16 * 16 * 16 * 16 * 128 / 2.0 / 1e12 and written == [[only]]
    assert "does not fit into the memory" in capsys.readouterr().out


def test_published_numbers_are_those_of_the_grid():
    lengths = sorted({shape.keys for shape in figure_5.SHAPES})
    assert lengths == [1 << n for n in range(10, 16)]
    assert all(len(line) == len(lengths) for by_dim in figure_5.PUBLISHED.values() for line in by_dim.values())
    assert figure_5.PUBLISHED["Attn-QAT"][128][-1] == 760
