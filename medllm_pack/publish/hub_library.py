"""The Hub's own library while something is written: kept quiet, given an end, and understood.

Its log holds signed addresses, its requests would wait for ever, and what it raises is turned into
one line with the next step. Knows nothing of packs or of what is sent.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from medllm_pack.errors import MedllmError, TransferError
from medllm_pack.weights.answers import Address, network_error, told

_ANSWER_S: Final = 300.0  # storage may take a minute to assemble


class XetError(TransferError):
    """The xet library failed, with an answer of nobody; LFS may still work."""


@contextmanager
def library() -> Iterator[None]:
    """Keep the Hub library from printing, and give its requests an end."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported lazily
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        get_session,
    )

    log = logging.getLogger("huggingface_hub")
    level, session, silent = log.level, get_session(), are_progress_bars_disabled()
    patient = session.timeout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # HF_HUB_DISABLE_PROGRESS_BARS, metadata of the card
        log.setLevel(logging.CRITICAL)
        disable_progress_bars()
        session.timeout = _ANSWER_S
        try:
            yield
        finally:
            log.setLevel(level)
            session.timeout = patient
            if not silent:
                enable_progress_bars()


@contextmanager
def translated(address: Address) -> Iterator[None]:
    """Turn what the Hub library raises while writing into one line with the next step."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except MedllmError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "README.md" in str(error):
            raise TransferError(
                "the Hub does not accept the metadata at the top of README.md; correct the "
                "recipe's card and build again"
            ) from error
        for cause in _causes(error):
            if isinstance(cause, HfHubHTTPError):
                if not str(cause.response.url).startswith(f"{address.endpoint}/"):
                    status = cause.response.status_code
                    raise _unreachable(address, f"the storage answers {status}") from error
                raise address.refused(cause) from error
            if isinstance(cause, network_error()):
                raise _unreachable(address, told(cause)) from error
        if isinstance(error, OSError | RuntimeError):  # hf_xet
            raise XetError(str(_unreachable(address, told(error)))) from error
        if isinstance(error, ValueError | KeyError | TypeError):
            raise TransferError(
                f"what answers at {address.host} does not answer as the Hub does; check "
                "HF_ENDPOINT, or try again later"
            ) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _unreachable(address: Address, problem: str) -> TransferError:
    return TransferError(
        f"the way to {address.name} broke off ({problem}) and nothing was committed; run the same "
        "command again, what has arrived is not sent twice"
    )


def leave_xet() -> bool:
    """Use LFS from now on; say whether that changes anything."""
    from huggingface_hub import constants

    if constants.HF_HUB_DISABLE_XET:
        return False
    constants.HF_HUB_DISABLE_XET = True
    return True
