"""Check that a run that is killed again and again ends bit for bit like an uninterrupted one, or say what differs.

    python -m scripts.check_resume --recipe finetune_qwen3.py --output outputs/check_resume --kills 3 \
        --config recipes/configs/smollm2_demo.yaml steps=200 checkpoint_every=25

Starts the recipe twice, side by side, with deterministic=true. One of the two is killed with SIGKILL, at steps drawn at random
and once in the middle of writing a checkpoint, and resumed each time. In the end the last checkpoints (weights, the state of the
optimizer, the schedule), the logs and the exports of both must be equal. Everything after the options goes to the recipe.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import load
from safetensors.torch import load_file

from scripts.arguments import new_parser
from scripts.paths import RECIPES, ROOT

_TIMED = ("tokens_per_second", "tflops_per_second", "mfu", "peak_memory_gib")
_POLL = 0.002


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and compare. Returns and prints the result.

    Raises:
        SystemExit: something differs, or a run failed.
    """
    parser = new_parser("scripts.check_resume", __doc__)
    parser.add_argument("--recipe", required=True, help="file in recipes/, such as finetune_qwen3.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for both runs; must not exist")
    parser.add_argument("--kills", type=int, default=3, help="how often the second run is killed (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments at which it is killed (default: 0)")
    options, settings = parser.parse_known_args(arguments)
    if options.output.exists():
        raise SystemExit(f"--output: {options.output} exists; choose another folder or remove it")
    if options.kills < 1:
        raise SystemExit(f"--kills: expected at least 1, got {options.kills}")
    options.output.mkdir(parents=True)
    began = time.perf_counter()
    whole, killed = options.output / "whole", options.output / "killed"
    reference = _start(options.recipe, settings, whole)
    try:
        kills = _run_with_kills(options.recipe, settings, killed, options.kills, random.Random(options.seed))
        _finish(reference, whole)
    finally:
        reference.kill()
    different = list(differences(whole, killed))
    steps = len((whole / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    result = {"steps": steps, "kills": kills, "seconds": round(time.perf_counter() - began, 1), "different": different}
    print(json.dumps(result, indent=1))
    if different:
        raise SystemExit(f"{len(different)} things differ between {whole} and {killed}, {different[0]} for one")
    print("bit-equal: weights, optimizer state, schedule, log and export")
    return result


def differences(one: Path, other: Path) -> Iterator[str]:
    """The names of everything that is not bit-equal in two finished runs."""
    last = max((int(path.name.split("-")[1]) for path in one.glob("checkpoint-*")), default=None)
    if last is None:
        raise SystemExit("nothing to compare: set checkpoint_every")
    for folder in (f"checkpoint-{last}", "export"):
        a, b = one / folder, other / folder
        names = {path.name for path in (*a.iterdir(), *b.iterdir()) if path.suffix in (".safetensors", ".bin", ".pkl")}
        for name in sorted(names):
            if not (a / name).is_file() or not (b / name).is_file():
                yield f"{folder}/{name}: there is only one"
            elif name.endswith(".safetensors"):
                yield from _different(load_file(a / name), load_file(b / name), f"{folder}/{name}")
            elif not name.startswith("random_states"):
                yield from _different(*(load(x / name, weights_only=True) for x in (a, b)), f"{folder}/{name}")
    yield from _different(_log(one), _log(other), "metrics.jsonl")


def _different(a: Any, b: Any, name: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from _different(a[key], b[key], f"{name}: {key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _different(x, y, f"{name}: {index}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a.cpu(), b.cpu()):
            yield name
    elif type(a) is not type(b) or a != b:
        yield name


def _log(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in record.items() if key not in _TIMED} for record in records]


def _run_with_kills(recipe: str, settings: list[str], run: Path, kills: int, generator: random.Random) -> list[dict[str, Any]]:
    """Kill the run this many times, and resume it until it ends. Returns when it was killed."""
    killed: list[dict[str, Any]] = []
    # One of the kills comes while a checkpoint is written.
    in_write = generator.randrange(kills)
    total = None
    while len(killed) < kills:
        process = _start(recipe, [*settings, "resume=latest"], run)
        start = _first_step(process, run)
        total = total or _steps(run)
        # Leave some steps for the next kills.
        step = generator.randint(start, max(start, total - 1 - (total // (2 * kills)) * (kills - len(killed) - 1)))
        moment = "in a checkpoint write" if len(killed) == in_write else "anywhere in a step"
        delay = generator.random() * 0.05
        while process.poll() is None and (_logged(run) < step if moment.startswith("any") else not _is_writing(run)):
            time.sleep(_POLL)
        time.sleep(delay if moment.startswith("any") else delay / 5)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*") if not path.suffix)
        killed.append({"moment": moment, "after_step": _logged(run), "interrupted_write": _is_writing(run), "checkpoints": kept})
        print(f"killed {moment} after step {_logged(run)}; checkpoints there: {kept}", flush=True)
    if len(killed) < kills:
        _finish(process, run)
        raise SystemExit(f"the run was over after {len(killed)} kills; give it more steps")
    _finish(_start(recipe, [*settings, "resume=latest"], run), run)
    return killed


def _start(recipe: str, settings: list[str], run: Path) -> subprocess.Popen[bytes]:
    paths = (str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(RECIPES / recipe), *settings, f"output_dir={run}", "deterministic=true"]
    # Beside the run's folder, which must be empty at the start.
    with run.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, stdout=log, stderr=log)


def _finish(process: subprocess.Popen[bytes], run: Path) -> None:
    if process.wait() != 0:
        log = run.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"the recipe failed with {process.returncode}:\n{log[-3000:]}")


def _first_step(process: subprocess.Popen[bytes], run: Path) -> int:
    """Wait until a run's log shows that it has started. Returns its next step."""
    before = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else None
    while process.poll() is None:
        if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_mtime_ns != before and _logged(run):
            return _logged(run) + 1
        time.sleep(_POLL)
    _finish(process, run)
    raise SystemExit("the run was over before it could be killed; give it more steps")


def _steps(run: Path) -> int:
    import yaml

    return yaml.safe_load((run / "settings.yaml").read_text(encoding="utf-8"))["steps"]


def _logged(run: Path) -> int:
    """The last step in the log."""
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:  # half a line
        return 0


def _is_writing(run: Path) -> bool:
    return any(run.glob("checkpoint-*.incomplete"))


if __name__ == "__main__":
    main()
