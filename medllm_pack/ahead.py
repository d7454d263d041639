"""Work on many things at once, with results in order and only a few things in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_DONE = 4  # items a worker that may be done and wait for one before them


def each(
    work: Callable[[Item], Result], items: Iterable[Item], *, workers: int, name: str
) -> Iterator[Result]:
    """Yield ``work`` of every item, in their order; ``workers`` + 1 of them are in work at a time.

    An item that takes long holds nobody up, until some more of those after it are done.

    Args:
        work: called by threads of a pool.
        items: asked for the next one only when there is room for it.
        workers: threads.
        name: of the threads.

    Raises:
        Exception: what an item or its work raises; the rest is not begun then.
    """
    pending: deque[Future[Result]] = deque()
    room = Semaphore(workers + 1)
    with ThreadPoolExecutor(workers, thread_name_prefix=name) as pool:
        try:
            for item in items:
                room.acquire()
                pending.append(pool.submit(work, item))
                pending[-1].add_done_callback(lambda _: room.release())
                while len(pending) > _DONE * workers or (pending and pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
