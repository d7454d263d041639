"""Reading and writing past the page cache: whole pages, from memory that begins at a page.

Bytes that a program passes once gain nothing from the page cache, and filling it costs more
processor time than quantizing does (docs/log.md). Where a file system or system knows no direct
reading and writing, the same calls go through the page cache. Knows nothing of models.
"""

from __future__ import annotations

import fcntl
import os

import numpy as np
from numpy.typing import NDArray

PAGE = 4096  # what file offsets, sizes and addresses must divide into; no device asks for more

_O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux


def switch_on(fd: int) -> bool:
    """Let a descriptor bypass the page cache; say whether the file system does it."""
    if not _O_DIRECT:
        return False
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | _O_DIRECT)
        os.preadv(fd, [aligned(PAGE).data], 0)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def switch_off(fd: int) -> None:
    """Let a descriptor go through the page cache, for what is not whole pages."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~_O_DIRECT)


def aligned(size: int) -> NDArray[np.uint8]:
    """Return ``size`` bytes of memory that begin at a page."""
    memory = np.empty(size + PAGE, dtype=np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start : start + size]


def page_floor(position: int) -> int:
    """Return where the page of a position begins."""
    return position - position % PAGE


def page_ceil(position: int) -> int:
    """Return where the first page begins that is not before a position."""
    return page_floor(position + PAGE - 1)
