"""Work on many things at once, with results in order and only a few things in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(
    work: Callable[[Item], Result], items: Iterable[Item], *, workers: int, name: str
) -> Iterator[Result]:
    """Yield ``work`` of every item, in their order; ``workers`` + 1 of them are taken at a time.

    Args:
        work: called by threads of a pool.
        items: asked for the next one only when there is room for it.
        workers: threads.
        name: of the threads.

    Raises:
        Exception: what an item or its work raises; the rest is not begun then.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix=name) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                while len(pending) > workers or (pending and pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
