"""How long to insist where another try may help, and when to give up.

Who tries again counts the failures, and gives up in words of its own. Knows nothing of HTTP but
which statuses pass and how an answer asks for a pause.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

AGAIN: Final = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may better

_PROGRESS: Final = 1 << 20  # bytes after which a failure is a first one again
_SLOWEST: Final = 1024  # bytes a second


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to insist.

    Attributes:
        tries: failures in a row after which it is given up.
        first_wait_s: pause after the first; it doubles, and varies by a quarter.
        longest_wait_s: bound of that pause.
        longest_asked_s: bound of the pause that a server may ask for.
        stall_s: silence after which a connection counts as dead.
        finish_s: the same at the end of an upload, where a registry may first put it together.
    """

    tries: int = 6
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    longest_asked_s: float = 120.0
    stall_s: float = 60.0
    finish_s: float = 300.0

    def count(self, failures: int, *, gained: int) -> int:
        """Return the failures in a row after another one, before which bytes had come.

        A few bytes a try would go on for ever, so they do not make it a first one.
        """
        return 1 if gained >= _PROGRESS else failures + 1

    def given_up(self, failures: int, problem: str, *, asked_s: float) -> str | None:
        """Return why there is to be no further try, or None.

        Args:
            failures: in a row.
            problem: the last one, in words that the reason begins with.
            asked_s: the pause that the server asks for.
        """
        if asked_s > self.longest_asked_s:
            return f"{problem}; it asks for a pause of {asked_s:.0f} s"
        return problem if failures >= self.tries else None

    def wait(self, failures: int, *, asked_s: float, stop: threading.Event | None = None) -> None:
        """Sleep before the next try, or until the user interrupts."""
        pause = self.first_wait_s * 2.0 ** (failures - 1) * random.uniform(0.75, 1.25)
        pause = max(min(pause, self.longest_wait_s), asked_s)
        (stop.wait if stop else time.sleep)(pause)


class Credit:
    """What a connection may still be waited for: a silence at most, and bytes buy it back.

    Any byte would otherwise be a sign of life, and a server that trickles be waited for for ever.

    Attributes:
        left_s: seconds; none or less when it is used up.
    """

    def __init__(self, stall_s: float) -> None:
        self.left_s = self._most_s = stall_s

    def spend(self, since: float, n_bytes: int) -> None:
        """Count what was waited, since a ``time.monotonic()``, and what came or went."""
        left = self.left_s - (time.monotonic() - since) + n_bytes / _SLOWEST
        self.left_s = min(left, self._most_s)

    def check(self) -> None:
        """Raise TimeoutError if it is used up."""
        if self.left_s <= 0:
            raise TimeoutError("it trickles")


def paced(pieces: Iterable[bytes], *, stall_s: float) -> Iterator[bytes]:
    """Yield the pieces of a body as they come.

    Raises:
        TimeoutError: if they come too slowly; whoever waits for one ends a silence.
    """
    credit, source = Credit(stall_s), iter(pieces)
    while True:
        credit.check()
        since = time.monotonic()
        piece = next(source, None)
        if piece is None:
            return
        credit.spend(since, len(piece))
        yield piece


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the pause in seconds that an answer asks for, as a number or as a date."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        then = parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0
    return max(then - time.time(), 0.0)
