"""scripts/bench_decode.py: without a GPU it says so; on one it measures what it says, and nothing that is wrong."""

import json

import pytest
import torch

import bench_decode


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_needs_a_gpu():
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        bench_decode.main([])


@pytest.mark.gpu
def test_results_are_complete(tmp_path, capsys):
    file = tmp_path / "decode.json"
    bench_decode.main(["--length", "300", "--batch", "2", "--rounds", "3", "--json", str(file)])
    results = json.loads(file.read_text())
    assert results[0]["name"] == "fp4 cache" and len(results) > 1
    assert all(0 < r["low"] <= r["ms"] <= r["high"] for r in results)
    assert "relative L2 of the output" in capsys.readouterr().out


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_what_is_wrong_is_not_timed(factor, monkeypatch):
    q, k = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 40, 32)
    cache = bench_decode.KVCache()
    cache.append(k, k)
    attention = cache.attention.__func__

    def eager(self, *inputs, impl):
        return attention(self, *inputs, impl="eager") * (factor if impl == "triton" else 1)

    monkeypatch.setattr(bench_decode.KVCache, "attention", eager)
    if factor == 1.0:
        bench_decode.check(cache, q, k[:, :, :1], k[:, :, :1])
        assert cache.length == 40 and cache.batch == 2
    else:
        with pytest.raises(SystemExit, match="expected less than 3e-03, got 1.00e-02"):
            bench_decode.check(cache, q, k[:, :, :1], k[:, :, :1])
