"""Transfers that break off: which may be tried again, and the end of trying.

Who tries again counts; whoever gave up says so with an error of its own, so that tries never
multiply. How long is for patience.py to say.
"""

from __future__ import annotations

import threading

from medllm_pack.errors import TransferError
from medllm_pack.patience import Patience


class InterruptedTransferError(TransferError):
    """A connection failed or fell silent, or the server is busy: worth another try.

    Attributes:
        asked_s: the pause that the server asked for.
        status: of the answer, if there was one.
    """

    def __init__(self, message: str, *, asked_s: float = 0.0, status: int | None = None) -> None:
        super().__init__(message)
        self.asked_s, self.status = asked_s, status


class GivenUpError(InterruptedTransferError):
    """It was tried as often as patience allows, or the server asks for too long a pause."""


class StoppedError(TransferError):
    """The user interrupted; what was sent is kept where the registry keeps it."""


def insist(
    patience: Patience,
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
    if said := patience.given_up(failures, str(error), asked_s=error.asked_s):
        raise GivenUpError(said, status=error.status) from error
    patience.wait(failures, asked_s=error.asked_s, stop=stop)
