"""How the library tells what it is doing; who listens decides how it looks.

The library never prints. It calls a :class:`Reporter`; the default is silent, the command line
draws bars, tests keep a list.
"""

from __future__ import annotations

from typing import Final, Protocol


class Reporter(Protocol):
    """A listener for the steps of a long job. Calls come from the thread that runs the job."""

    def step(self, name: str, *, total_bytes: int | None = None) -> None:
        """Begin a step; ``total_bytes`` is what :meth:`advance` will add up to, if known."""

    def advance(self, n_bytes: int) -> None:
        """Report that ``n_bytes`` more of the current step are done."""

    def notice(self, text: str) -> None:
        """Report a fact that the user should know and that does not stop the job."""


class Silent:
    """A reporter that listens to nothing."""

    def step(self, name: str, *, total_bytes: int | None = None) -> None:
        """Ignore the step."""

    def advance(self, n_bytes: int) -> None:
        """Ignore the advance."""

    def notice(self, text: str) -> None:
        """Ignore the notice."""


SILENT: Final[Reporter] = Silent()  # the default of every public function
