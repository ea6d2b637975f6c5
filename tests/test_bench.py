"""scripts/bench.py: it measures what it says, and nothing that is wrong."""

import json

import pytest
import torch

import bench


@pytest.mark.skipif(torch.cuda.is_available(), reason="times other implementations there")
def test_results_are_complete(tmp_path, capsys):
    file = tmp_path / "bench.json"
    bench.main(["--shape", "1,4,2,33,48,32", "--shape", "1,2,2,20,20,16,causal", "--rounds", "3", "--json", str(file)])
    results = json.loads(file.read_text())
    assert {(r["queries"], r["causal"], r["what"], r["name"]) for r in results} == {
        (queries, causal, what, name)
        for queries, causal in ((33, False), (20, True))
        for what in ("forward", "forward+backward")
        for name in ("eager", "sdpa flash")
    }
    assert all(0 < low <= median <= high for low, median, high in (r["seconds"] for r in results))
    assert all(r["torch"] == torch.__version__ and "CPU" in r["device"] for r in results)
    printed = capsys.readouterr().out
    assert "relative L2 of dk" in printed and "TFLOP/s" in printed


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    right = bench.qat_kernels.attention

    def wrong(q, k, v, **options):
        return right(q, k, v, **options) * (1.01 if q.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(bench.qat_kernels, "attention", wrong)
    with pytest.raises(SystemExit, match="relative L2 of output: expected less than 3e-03, got 1"):
        bench.main(["--shape", "1,2,2,32,32,32"])
    assert "ms (" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1,2,3", "1,2,2,32,32,x", "0,2,2,32,32,32"])
def test_shapes_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        bench.main(["--shape", text])
    assert "expected a shape such as" in capsys.readouterr().err
