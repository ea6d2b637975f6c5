"""How the child process ends, and what that means for the case that it was checking."""

import time

import pytest

from qat_patch.self_check import child
from support.kernels.fake_gpu import passed, says

CASES = [{"head_dim": head_dim, "causal": False, "spec": "{}", "dtype": "bfloat16"} for head_dim in (64, 128)]


def test_every_case_is_reported(monkeypatch):
    says(monkeypatch, passed())
    assert list(child.results("cuda:0", CASES)) == [{"case": case} | passed() for case in CASES]


@pytest.mark.parametrize(
    ("code", "state", "words"),
    [
        ("time.sleep(60)", "failed", "it hung: killed after 0.5 s a case"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "killed by SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", "killed by SIGKILL"),
        ("raise RuntimeError('an illegal memory access')", "failed", "crashed with status 1: RuntimeError: an illegal memory"),
        ("sys.exit(7)", "failed", "crashed with status 7"),
        ("raise RuntimeError('CUDA error: out of memory')", "none", "out of memory: RuntimeError: CUDA error"),
        ("raise MemoryError", "none", "out of memory: MemoryError"),
    ],
)
def test_a_silent_child_is_explained_by_how_it_ended(monkeypatch, code, state, words):
    """The second case does it; the first and a third, which another child takes, are as good as ever."""
    code = f"""
for case in request["cases"]:
    if case["head_dim"] == 128:
        {code}
    say(case, result)
"""
    says(monkeypatch, passed(), code)
    monkeypatch.setattr(child, "SECONDS", 0.5)
    began = time.monotonic()
    first, second, third = child.results("cuda:0", [*CASES, CASES[0] | {"causal": True}])
    assert (first["state"], third["state"]) == ("passed", "passed") and third["case"]["causal"]
    assert second["state"] == state and words in second["reason"]
    assert time.monotonic() - began < 10


def test_an_announced_end_does_not_count_as_a_second_failure(monkeypatch):
    code = """
say(request["cases"][0], {"state": "failed", "reason": "it stopped with RuntimeError: x"})
sys.exit(1)
"""
    says(monkeypatch, None, code)
    assert [each["reason"] for each in child.results("cuda:0", CASES)] == ["it stopped with RuntimeError: x"] * 2


def test_the_child_gets_its_request_and_no_rank(monkeypatch):
    code = """
print("noise of a library")
ranks = [name for name in ("RANK", "LOCAL_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID") if name in os.environ]
for case in request["cases"]: say(case, {"state": "none", "reason": [request["device"], ranks, os.environ["KEPT"]]})
"""
    for name in ("RANK", "LOCAL_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "KEPT"):
        monkeypatch.setenv(name, "1")
    says(monkeypatch, None, code)
    assert [each["reason"] for each in child.results("cuda:3", CASES[:1])] == [["cuda:3", [], "1"]]
