"""Patched models on two processes of a CPU: context parallelism of Diffusers, DDP, FSDP2, and calibration."""

from pathlib import Path

import pytest

from runs import run_in_two_processes
from two_ranks import KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_compute_what_one_does(kind):
    run_in_two_processes([str(Path(__file__).parent / "two_ranks.py"), kind])
