"""Means, gaps and their standard errors, over held-out windows and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Matrix = Sequence[Sequence[float]]
"""A row a seed, a column a window; all runs measure the same windows."""


class Estimate(NamedTuple):
    """A mean and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if math.isnan(self.error) else f"{self.mean:.4f} ± {self.error:.4f}"

    def signed(self) -> str:
        """For differences."""
        return ("+" if self.mean >= 0 else "") + str(self)


def estimate(values: Matrix) -> Estimate:
    """The mean over windows and seeds.

    Both are samples, of the text and of the training: the error is the root of the squared standard errors of the means of the
    windows and of the means of the seeds, which counts what is left over twice and so is rather too large. Of a single seed it is
    that over windows alone; of a single number it is NaN.
    """
    by_seed = [_mean(row) for row in values]
    by_window = [_mean(column) for column in zip(*values, strict=True)]
    errors = [_standard_error(means) for means in (by_seed, by_window) if len(means) > 1]
    return Estimate(_mean(by_seed), math.hypot(*errors) if errors else math.nan)


def difference(ours: Matrix, theirs: Matrix) -> Matrix:
    """Of runs with equal seeds on equal windows; one row of `theirs` serves for all of `ours`.

    Raises:
        ValueError: there are other windows, or another number of seeds.
    """
    if len(theirs) not in (1, len(ours)) or len({len(row) for row in (*ours, *theirs)}) != 1:
        shapes = " and ".join(f"{len(x)} x {len(x[0])}" for x in (ours, theirs))
        raise ValueError(f"difference: expected the same seeds and windows on both sides, got {shapes}")
    theirs = list(theirs) * len(ours) if len(theirs) == 1 else theirs
    return [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(ours, theirs, strict=True)]


def ratio(ours: Matrix, theirs: Sequence[float]) -> Estimate:
    """Mean over mean, paired by window; the error to first order (that of a ratio of means of pairs), as `estimate` has it."""
    whole = _mean(theirs)
    mean = estimate(ours).mean / whole
    left_over = [[(x - mean * y) / whole for x, y in zip(row, theirs, strict=True)] for row in ours]
    return Estimate(mean, estimate(left_over).error)


def share(ours: Matrix, theirs: Sequence[float]) -> str:
    """How much of an untrained gap is left, such as `0.31 ± 0.02`; of a whole that is nothing it is no number."""
    if _mean(theirs) <= 0:
        return ""
    mean, error = ratio(ours, theirs)
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
