"""scripts.bench.scale_out, tiny and on two processes of a CPU."""

import json

import pytest

from scripts.bench import scale_out
from support.runs.runs import run_in_two_processes


@pytest.mark.parametrize(("model", "how"), [("wan", "fsdp2"), ("qwen3", "ddp")])
def test_two_processes_train_what_one_does(model, how, tmp_path, monkeypatch):
    arguments = ["--seed", "0", "--steps", "4", "--tiny", "--json"]
    run_in_two_processes(["-m", scale_out.__name__, "run", model, how, *arguments, str(tmp_path / "two.json")])
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    scale_out.main(["run", model, "one", *arguments, str(tmp_path / "one.json")])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["losses"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=2e-2) and len(one) == 4
    with pytest.raises(SystemExit, match="expected one process for one, else two"):
        scale_out.main(["run", model, "ddp", *arguments, str(tmp_path / "ddp.json")])
    scale_out.dist.destroy_process_group()


def test_the_verdict(tmp_path, capsys):
    ends = {"a": 1.0, "b": 1.02, "c": 1.01, "near": 1.049, "far": 1.06}
    for name, end in ends.items():
        (tmp_path / name).write_text(json.dumps({"losses": [9.0] * 10 + [end] * 50}))
    files = [str(tmp_path / name) for name in "abc"]
    assert scale_out.main(["compare", *files, "--with", str(tmp_path / "near")]) == 0
    assert scale_out.main(["compare", *files, "--with", str(tmp_path / "near"), str(tmp_path / "far")]) == 1
    assert "NOT within" in capsys.readouterr().out
