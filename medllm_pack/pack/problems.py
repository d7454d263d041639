"""What is wrong with a plan, collected so that all of it is reported at once.

Knows nothing of plans: whoever asks a question says whether the next one makes sense without an
answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from medllm_pack.errors import MedllmError, PlanError, UsageError

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Problems:
    """The problems of one subject, such as a recipe's name, in the order they were found."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.found: list[str] = []

    def attempt(self, do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """Return what ``do`` returns; note its error and return None.

        Raises:
            UsageError: from ``do``: a wrong question is not a finding.
        """
        try:
            return do(*args, **kwargs)
        except UsageError:
            raise
        except MedllmError as error:
            self.found += error.lines()
            return None

    def need(self, do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what ``do`` returns; without it nothing more can be said, so stop here.

        Raises:
            PlanError: with everything that was found.
        """
        result = self.attempt(do, *args, **kwargs)
        if result is None:
            raise PlanError(self.subject, self.found)
        return result

    def stop_if_any(self) -> None:
        """Raise what was found.

        Raises:
            PlanError: if it is anything.
        """
        if self.found:
            raise PlanError(self.subject, self.found)
