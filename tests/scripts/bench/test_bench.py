"""python -m scripts.bench: it measures what it says, and nothing that is wrong."""

import argparse
import json

import pytest
import torch

import qat_kernels
from qat_patch.bench.shapes import Shape
from scripts.bench import __main__ as bench
from support.kernels.interpreter import interpreted

INFERENCE = ["inference", "--shape", "1,4,2,33,48,32", "--shape", "1,2,1,40,40,16,causal", "--rounds", "2", "--json"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="times other implementations there")
def test_results_are_complete(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main(
        ["attention", "--shape", "1,4,2,33,48,32", "--shape", "1,2,2,20,20,16,causal", "--rounds", "3", "--json", str(file)]
    )
    results = json.loads(file.read_text())
    assert {(r["queries"], r["causal"], r["what"], r["name"]) for r in results} == {
        (queries, causal, what, name)
        for queries, causal in ((33, False), (20, True))
        for what in ("forward", "forward+backward")
        for name in ("ours", "sdpa flash")
    }
    assert all(0 < low <= median <= high for low, median, high in (r["seconds"] for r in results))
    assert all(r["torch"] == torch.__version__ and "CPU" in r["device"] for r in results)
    kept = {r["name"]: r["kept_bytes"] for r in results if r["what"] == "forward+backward" and not r["causal"]}
    assert kept["ours"] >= 2 * (4 * 33 + 2 * 2 * 48) * 32 * 1  # Q, O', K and V of bfloat16
    printed = capsys.readouterr().out
    assert "relative L2 of dk" in printed and "TFLOP/s" in printed
    table = bench.main(["report", str(file), "--png", str(tmp_path / "bench.png")])
    assert table == results
    printed = capsys.readouterr().out
    assert "| B 1, H 4/2, L 33x48, D 32 | forward+backward |" in printed and "ours / FlashAttention-2" in printed
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="times other implementations there")
def test_packed_documents_are_timed_and_counted(capsys):
    (forward, both) = bench.main(["attention", "--shape", "1,4,2,600,600,32,causal,packed", "--rounds", "3"])
    assert forward["packed"] and both["seconds"][1] > 0
    shape = Shape.parse("1,4,2,600,600,32,causal,packed")
    assert shape.documents() == [300, 150, 150]
    assert shape.flops(False) == 4 * 4 * (300**2 + 2 * 150**2) * 32 / 2  # half of it is masked


@pytest.mark.skipif(torch.cuda.is_available(), reason="times other implementations there")
def test_windows_and_blocks_are_timed_and_counted(capsys):
    shapes = (
        "1,2,1,50,50,32,causal,window=20",
        "1,2,1,50,50,32,causal,block_size=7,window=9",
        "1,2,1,50,60,32,causal,block_size=7",
    )
    results = bench.main(["attention", *(f"--shape={shape}" for shape in shapes), "--rounds", "3"])
    assert [(r["window"], r["block_size"], r["name"]) for r in results[::2]] == [(20, 1, "ours"), (9, 7, "ours"), (0, 7, "ours")]
    for shape in map(Shape.parse, shapes):
        seen = 0
        for query in range(shape.queries):
            last = (query + shape.keys - shape.queries) // shape.block_size * shape.block_size + shape.block_size - 1
            seen += sum(key <= last and (not shape.window or key > last - shape.window) for key in range(shape.keys))
        assert shape.flops(False) == 4 * 2 * 32 * seen
    for wrong in ("1,2,1,50,50,32,window=20", "1,2,1,50,50,32,causal,packed,window=20", "1,2,1,50,50,32,causal,window=0"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a shape such as"):
            Shape.parse(wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times other implementations there")
def test_inference_is_checked_and_timed_with_each_recipe(tmp_path, capsys):
    file = tmp_path / "bench.json"
    interpreted(bench.main, [*INFERENCE, str(file)])
    results = json.loads(file.read_text())
    names = ["fp4", "fp4, nvfp4_qk", "triton", "sdpa flash"]
    assert [(r["queries"], r["name"]) for r in results] == [(queries, name) for queries in (33, 40) for name in names]
    assert all(r["what"] == "forward" and r["seconds"][1] > 0 for r in results)
    bench.main(["report", str(file)])
    table = capsys.readouterr().out
    ratio = results[1]["seconds"][1] / results[3]["seconds"][1]
    assert "fp4 / FlashAttention-2" in table and f"{ratio:.2f}" in table.splitlines()[-2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it can run there")
def test_inference_says_what_it_cannot_run(tmp_path):
    with pytest.raises(SystemExit, match="bench: inference: expected tensors on an NVIDIA GPU, got cpu"):
        bench.main([*INFERENCE, str(tmp_path / "bench.json")])


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    right = qat_kernels.attention

    def wrong(q, k, v, **options):
        return right(q, k, v, **options) * (1.02 if q.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(qat_kernels, "attention", wrong)
    with pytest.raises(SystemExit, match="relative L2 of output: expected less than 3e-03, got 2"):
        bench.main(["attention", "--shape", "1,2,2,32,32,32"])
    assert "ms (" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1,2,3", "1,2,2,32,32,x", "0,2,2,32,32,32"])
def test_shapes_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        bench.main(["attention", "--shape", text])
    assert "expected a shape such as" in capsys.readouterr().err


def test_one_round_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["attention", "--shape", "1,1,1,16,16,16", "--rounds", "1"])
    assert "--rounds: expected at least 2, got 1" in capsys.readouterr().err
