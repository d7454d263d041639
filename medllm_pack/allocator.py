"""What the C library does with memory that was freed.

A build asks for the same few arrays again for every block. glibc gives arrays of that size back to
the kernel at once, which fills them with zeros when they are asked for the next time; docs/log.md
has what that costs. Knows nothing of models.
"""

from __future__ import annotations

import ctypes

# malloc.h of glibc; other C libraries have no mallopt, or ignore what they do not know.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
# Older releases of glibc refuse more (HEAP_MAX_SIZE / 2 in malloc.c) and would then give back every
# array, for the other setting ends what they learn by themselves. Arrays of a block are smaller.
_LARGEST_KEPT = 32 << 20


def keep_freed_memory() -> None:
    """Keep what is freed for the next array, in the whole process and for good.

    The peak does not rise by it: what is kept has been in use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
