"""Files without a name: what is in them is gone with the last process that has them open.

However that process ends, by SIGKILL or with the machine: no name leads to such a file, so the file
system takes it back. Nobody has to clean up, and nobody can forget to. Freed blocks are not
overwritten: who fears for the disk itself encrypts it, or sets TMPDIR to a folder in memory.

The paths here are those of descriptors, ``/proc/self/fd/N``. They lead to a file as long as it is
open, in this process and in one that is given the descriptor. Knows nothing of what is written.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medllm_pack import files

_DESCRIPTORS = Path("/proc/self/fd")


class Nameless(ExitStack):
    """Files that take room in the folder for temporary files, until this is closed.

    Each costs a descriptor; whoever needs hundreds writes more into each.
    """

    def new(self) -> Path:
        """Return the path of a new, empty file.

        Raises:
            WriteError: if there is no folder for temporary files that takes one.
        """
        with _explained():
            # O_TMPFILE; where a file system does not know that, the name is removed at once.
            file = tempfile.TemporaryFile(buffering=0, dir=_folder())  # noqa: SIM115
        self.enter_context(file)
        return _DESCRIPTORS / str(file.fileno())

    def save(self, array: NDArray[Any]) -> Path:
        """Write an array into a new file, as ``numpy.save`` does; return its path.

        Raises:
            WriteError: if the disk does not take it.
        """
        path = self.new()
        with _explained(), path.open("wb") as file:
            np.save(file, array)
        return path


def descriptor(path: Path) -> int:
    """Return the descriptor by whose path a file is known."""
    return int(path.name)


def _folder() -> str:
    """Return the folder for temporary files.

    If nothing can be written to ``TMPDIR``, tempfile goes elsewhere without a word; but whoever
    names a folder in memory wants nothing on a disk.
    """
    return os.environ.get("TMPDIR") or tempfile.gettempdir()


def _explained() -> AbstractContextManager[None]:
    """Turn an OSError into one that names the folder and the remedy."""
    return files.translated(
        Path(_folder()), what="a temporary file in",
        elsewhere="another folder with TMPDIR",
    )  # fmt: skip
