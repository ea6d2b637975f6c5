"""scripts.bench.decode: without a GPU it says so; on one it measures what it says, and nothing that is wrong."""

import json

import pytest
import torch

from scripts.bench import __main__ as bench
from scripts.bench import decode as bench_decode


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_needs_a_gpu():
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU"):
        bench_decode.main([])


@pytest.mark.gpu
def test_results_are_complete(tmp_path, capsys):
    file = tmp_path / "decode.json"
    bench_decode.main(["--length", "300", "--batch", "2", "--rounds", "3", "--json", str(file)])
    results = json.loads(file.read_text())
    assert [each["name"] for each in results[:2]] == ["fp4 cache", "kv_nvfp4 cache"] and len(results) > 2
    assert results[1]["bytes"] < 0.4 * results[2]["bytes"]  # of 384 tokens, for 300
    assert all(0 < r["low"] <= r["ms"] <= r["high"] for r in results)
    assert "relative L2 of the output" in capsys.readouterr().out


def test_generation_is_timed_and_reported(tmp_path, capsys):
    file = tmp_path / "generate.json"
    bench_decode.main(["--generate", "--tiny", "--layers=2", "--length=300", "--batch=1", "--batch=2", "--json", str(file)])
    results = json.loads(file.read_text())
    assert [(r["batch"], r["name"]) for r in results] == [(n, name) for n in (1, 2) for name in ("bf16 cache", "fp4 cache")]
    for r in results:
        low, median, high = r["tokens_per_second"]
        assert 0 < low <= median <= high and r["first_token_seconds"] > 0
        # All tokens but the last are in the cache.
        assert (
            r["name"] == "fp4 cache" or r["cache_bytes"] == 2 * 2 * r["batch"] * 2 * (300 + bench_decode.NEW_TOKENS - 1) * 32 * 2
        )
    assert results[1]["cache_bytes"] < 0.6 * results[0]["cache_bytes"]
    capsys.readouterr()
    bench.main(["report", str(file), "--png", str(tmp_path / "generate.png")])
    assert f"| 2 | 300 | 2 | fp4 cache | {results[3]['first_token_seconds']:.2f} |" in capsys.readouterr().out
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")


def test_steps_are_reported_against_the_fastest(tmp_path, capsys):
    file = tmp_path / "decode.json"
    times = {"fp4 cache": (0.2, 30), "bf16 sdpa flash": (0.5, 100), "bf16 sdpa cudnn": (0.4, 100)}
    cell = {"device": "GPU", "torch": "2", "batch": 8, "length": 32768}
    file.write_text(json.dumps([cell | {"name": name, "ms": ms, "bytes": n} for name, (ms, n) in times.items()]))
    bench.main(["report", str(file), "--png", str(tmp_path / "decode.png")])
    assert "| 8 | 32,768 | 0.200 | 0.400 | cudnn | 2.00 | 0.300 |" in capsys.readouterr().out
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_both_caches_are_reported(tmp_path, capsys):
    file = tmp_path / "decode.json"
    times = {"fp4 cache": (0.2, 30), "kv_nvfp4 cache": (0.25, 28), "bf16 sdpa flash": (0.4, 100)}
    file.write_text(
        json.dumps(
            [
                {"device": "GPU", "torch": "2", "batch": 8, "length": 32768, "name": name, "ms": ms, "bytes": n}
                for name, (ms, n) in times.items()
            ]
        )
    )
    bench.main(["report", str(file), "--png", str(tmp_path / "decode.png")])
    printed = capsys.readouterr().out
    assert "| fp4 cache, ms | kv_nvfp4 cache, ms | best bf16 sdpa, ms |" in printed
    assert "| 8 | 32,768 | 0.200 | 0.250 | 0.400 | flash | 2.00 | 1.60 | 0.300 | 0.280 |" in printed


def test_a_small_model_is_for_generate_only(capsys):
    with pytest.raises(SystemExit):
        bench_decode.main(["--tiny"])
    assert "for --generate only" in capsys.readouterr().err


@pytest.mark.parametrize("factor", [1.0, 1.01])
@pytest.mark.parametrize("name", bench_decode.CACHES)
def test_what_is_wrong_is_not_timed(name, factor, monkeypatch):
    q, k = torch.randn(2, 4, 1, 32), torch.randn(2, 2, 40, 32)
    cache = bench_decode.KVCache()
    cache.append(k, k, spec=bench_decode.CACHES[name])
    attention = cache.attention.__func__

    def eager(self, *inputs, spec, impl):
        return attention(self, *inputs, spec=spec, impl="eager") * (factor if impl == "triton" else 1)

    monkeypatch.setattr(bench_decode.KVCache, "attention", eager)
    if factor == 1.0:
        bench_decode.check(cache, q, k[:, :, :1], k[:, :, :1])
        assert cache.length == 40 and cache.batch == 2
    else:
        with pytest.raises(SystemExit, match="expected less than 3e-03, got 1.00e-02"):
            bench_decode.check(cache, q, k[:, :, :1], k[:, :, :1])
