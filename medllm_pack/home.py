"""Where the user's home folder is, also for users that have none, as in many containers.

No imports from the rest of the package but the errors.
"""

from __future__ import annotations

from pathlib import Path

from medllm_pack.errors import UsageError, shown

# Not even root can make this one.
_NONE = Path("/dev/null/no-home")


def home() -> Path:
    """Return the home folder; without HOME and an entry in passwd, a path that does not exist."""
    try:
        return Path.home()
    except RuntimeError:
        return _NONE


def is_missing(path: Path) -> bool:
    """Say whether a path lies in the home folder of a user that has none."""
    return path.is_relative_to(_NONE)


def expanded(text: str | Path) -> Path:
    """Return a path with ``~`` and ``~user`` at its beginning replaced.

    Raises:
        UsageError: if there is no such home folder.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UsageError(f"{shown(text)} names a home folder that does not exist") from error
