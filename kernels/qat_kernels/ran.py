"""Which implementations calls of attention really ran: counted where they run, so torch.compile and caches cannot hide it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

_open: list[Counter[str]] = []


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Inside, every call of the process counts under the name of what runs it; a replayed CUDA graph counts once, when captured.

    Names are those of `impl`; steps over the FP4 cache are `decode`, or `eager` in PyTorch.
    """
    counts: Counter[str] = Counter()
    _open.append(counts)
    try:
        yield counts
    finally:
        # By identity: equal counters are not the same.
        del _open[next(place for place, each in enumerate(_open) if each is counts)]


def note(name: str) -> None:
    """A call runs now."""
    for counts in _open:
        counts[name] += 1
