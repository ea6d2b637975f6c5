"""Patched models on two processes of a CPU: context parallelism of Diffusers, DDP, FSDP2, and calibration."""

import pytest

from support.runs import two_ranks
from support.runs.runs import run_in_two_processes


@pytest.mark.parametrize("kind", two_ranks.KINDS)
def test_two_ranks_compute_what_one_does(kind):
    run_in_two_processes([two_ranks.__file__, kind])
