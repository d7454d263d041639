"""How long to insist where another try may help, and when to give up.

Who tries again counts; whoever gave up says so with an error of its own, so that tries never
multiply. Knows nothing of HTTP but how it names a pause.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final

from medllm_pack.errors import TransferError

AGAIN: Final = (408, 425, 429, 500, 502, 503, 504)  # statuses that another try may better


class InterruptedTransferError(TransferError):
    """A connection failed or fell silent, or the server is busy: worth another try.

    Attributes:
        asked_s: the pause that the server asked for.
    """

    def __init__(self, message: str, *, asked_s: float = 0.0) -> None:
        super().__init__(message)
        self.asked_s = asked_s


class GivenUpError(InterruptedTransferError):
    """It was tried as often as patience allows, or the server asks for too long a pause."""


class StoppedError(TransferError):
    """The user interrupted; what was sent is kept where the registry keeps it."""


@dataclass(frozen=True)
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

    def wait(
        self,
        failures: int,
        error: InterruptedTransferError,
        *,
        stop: threading.Event | None = None,
    ) -> None:
        """Sleep before the next try, or until the user interrupts.

        Raises:
            GivenUpError: if there is to be none.
        """
        if isinstance(error, GivenUpError):
            raise error
        if failures >= self.tries:
            raise GivenUpError(str(error)) from error
        if error.asked_s > self.longest_asked_s:
            raise GivenUpError(f"{error}; it asks for a pause of {error.asked_s:.0f} s") from error
        pause = self.first_wait_s * 2.0 ** (failures - 1) * random.uniform(0.75, 1.25)
        pause = max(min(pause, self.longest_wait_s), error.asked_s)
        (stop.wait if stop else time.sleep)(pause)


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
