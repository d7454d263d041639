"""What the Hub's answers mean: which are final and what to do then, which another try may better.

Translates the errors of huggingface_hub and of the HTTP library below it. Sends nothing.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from medllm_pack.errors import SourceError, TransferError, shown
from medllm_pack.patience import AGAIN, Patience, retry_after

# huggingface_hub takes a third of a second to import; folders do without it.
if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub.errors import HfHubHTTPError

HUB: Final = Patience(stall_s=30.0)  # a fresh connection costs little here

_MEANINGS: Mapping[Any, str] = {
    ("GatedRepoError", 403): "your account has no access to the gated repository {repo} yet: ask "
    "for it at {page}, and use a token of that account (`hf auth login`)",
    "GatedRepoError": "{repo} is gated: accept its conditions at {page}, log in with "
    "`hf auth login`, and try again",
    "RepositoryNotFoundError": "{repo} is not on the Hub, or it is private: check the name; if it "
    "is private, log in with `hf auth login`",
    "RevisionNotFoundError": "{repo} has no revision {revision}; {page}/commits lists them",
    "EntryNotFoundError": "{repo} lists {file} at {revision} but does not serve it; try again "
    "later or name another revision",
    "DisabledRepoError": "{repo} has been disabled on the Hub; {page} may say why",
    401: "the Hub does not accept your token: log in again with `hf auth login`, or unset HF_TOKEN",
    403: "your token may not read {repo}: allow it at https://huggingface.co/settings/tokens",
}

# Where something is to be written, these mean something else.
_WRITING: Mapping[Any, str] = {
    401: "the Hub does not accept your token: log in again with `hf auth login`, or unset HF_TOKEN",
    403: "you may not write to {repo}: use a token with write access to it "
    "(https://huggingface.co/settings/tokens), join its organisation, and look whether the "
    "storage of the account is used up",
    "RepositoryNotFoundError": "{repo} cannot be written: it is not on the Hub for your account; "
    "check the name, and log in with `hf auth login`",
    402: "the storage of the account that owns {repo} is used up; see {page}/settings",
    409: "{repo} is being changed by someone else; run the same command again",
    412: "someone else committed to {repo} meanwhile, so nothing was committed here; run the same "
    "command again",
    413: "the Hub finds a file too large for {repo}; see {page}/settings",
}


class PassingError(Exception):
    """What another try may better.

    Attributes:
        asked_s: the pause that the server asked for.
    """

    def __init__(self, problem: str, *, asked_s: float = 0.0) -> None:
        super().__init__(problem)
        self.asked_s = asked_s


@dataclass(frozen=True, slots=True)
class Address:
    """A repository as it is asked for.

    Attributes:
        name: ``org/name``.
        revision: branch, tag or commit.
        endpoint: the Hub, without a slash at the end.
    """

    name: str
    revision: str
    endpoint: str

    @property
    def host(self) -> str:
        """Name of the Hub's machine, for messages."""
        return urlsplit(self.endpoint).hostname or self.endpoint

    def explained(self, error: HfHubHTTPError, file: str = "") -> SourceError:
        """Say what an answer means and what to do, by the library's class, then by status."""
        return SourceError(self._meaning(error, _MEANINGS, file))

    def refused(self, error: HfHubHTTPError) -> TransferError:
        """Say what an answer to a request to write means and what to do."""
        return TransferError(self._meaning(error, {**_MEANINGS, **_WRITING}, ""))

    def _meaning(self, error: HfHubHTTPError, meanings: Mapping[Any, str], file: str) -> str:
        status = error.response.status_code
        for cls in type(error).__mro__:
            if meaning := meanings.get((cls.__name__, status)) or meanings.get(cls.__name__):
                break
        else:
            meaning = meanings.get(status, "the Hub answers {status} for {repo}; try again later")
        return meaning.format(
            repo=self.name,
            page=f"https://huggingface.co/{self.name}",
            revision=shown(self.revision),
            file=shown(file),
            status=status,
        )


def network_error() -> tuple[type[Exception], ...]:
    """Return the errors of the HTTP library that the Hub library is built on.

    Which library that is changed between its major versions (httpx, httpx2).
    """
    from huggingface_hub.errors import HfHubHTTPError

    library = importlib.import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])
    return library.HTTPError, library.InvalidURL


def told(error: Exception) -> str:
    """Say which network error it was."""
    # Not the error's text: it may hold an address with a signature in it.
    name = type(error).__name__
    return "no answer in time" if name.endswith("Timeout") else f"network error: {name}"


@contextmanager
def understood(address: Address, file: str = "") -> Iterator[None]:
    """Turn what goes wrong while the Hub answers into what it means.

    Args:
        address: the repository.
        file: which of its files is asked for.

    Raises:
        SourceError: if it is final.
        PassingError: if another try may better it.
    """
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        if error.response.status_code not in AGAIN:
            raise address.explained(error, file) from error
        raise busy(error.response, "it") from error
    except network_error() as error:
        raise PassingError(told(error)) from error
    except TimeoutError as error:
        raise PassingError("no answer in time") from error


def busy(response: Response, who: str) -> PassingError:
    """Return what an answer means that another try may better."""
    asked_s = retry_after(response.headers)
    return PassingError(f"{who} answers {response.status_code}", asked_s=asked_s)
