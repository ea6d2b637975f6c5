"""Wan under the context parallelism of Diffusers, on two processes of a CPU."""

from pathlib import Path

import pytest

from runs import run_in_two_processes


@pytest.mark.parametrize("kind", ["ulysses", "ring"])
def test_two_ranks_compute_what_one_does(kind):
    run_in_two_processes([str(Path(__file__).parent / "two_ranks_wan.py"), kind])
