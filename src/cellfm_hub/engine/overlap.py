"""Prepare what comes next while the device computes."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

AHEAD = 2
"""Items that are ready, or being made, beside the one in use."""


@contextmanager
def prefetch(items: Iterator[T], ahead: int = AHEAD) -> Iterator[Iterator[T]]:
    """Run an iterator in a thread of its own, `ahead` items before they are asked for.

    Order stays, and an exception comes at the place where it arose. On leaving, at most the item under way is finished; then the thread is
    gone, and the iterator is closed if it is a generator.

    Parameters
    ----------
    items
        Should spend its time in code that releases the GIL: reading, compiled loops, numpy.

    Examples
    --------
    >>> with prefetch(x * x for x in range(4)) as squares:
    ...     list(squares)
    [0, 1, 4, 9]
    """
    end = object()
    worker = ThreadPoolExecutor(1, thread_name_prefix="cellfm-prefetch")

    def stream() -> Iterator[T]:
        coming = deque(worker.submit(next, items, end) for _ in range(ahead))
        while (item := coming.popleft().result()) is not end:
            coming.append(worker.submit(next, items, end))
            yield item  # type: ignore[misc]  # it is not `end`

    try:
        yield stream()
    finally:
        worker.shutdown(cancel_futures=True)
        getattr(items, "close", lambda: None)()
