"""What goes on beside a file that another's code sends: its digest, and how far it has come.

Each is a context manager around the sending, with a thread of its own. Knows nothing of networks.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

from medllm_pack import files
from medllm_pack.ollama.image import Blob
from medllm_pack.progress import Reporter

_LOOK_S: Final = 0.2


class Digesting:
    """Digests a file beside the sending of it, to its end unless the user interrupts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.hex = ""

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stopped = kind is not None and not issubclass(kind, Exception)
        self._thread.join()

    def _run(self) -> None:
        # A file that cannot be read leaves an empty digest, which is no file's.
        with suppress(OSError, InterruptedError):
            self.hex = files.sha256(self._path, advance=self._go_on)

    def _go_on(self, _: int) -> None:
        if self._stopped:
            raise InterruptedError


class Watch:
    """Tells how far a file of this process has been read, whoever reads it.

    The library has no hook that serves both of its ways, so /proc is asked where it reads: the
    slowest reader counts, which sends. Without /proc the file is told when it is done. The thread
    that runs the job waits inside the library meanwhile.
    """

    def __init__(self, blob: Blob, report: Reporter) -> None:
        assert isinstance(blob.source, Path)
        self._path, self._size, self._report = str(blob.source.resolve()), blob.size, report
        self._told = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if kind is None:
            self._tell(self._size)

    def _look(self) -> None:
        while not self._done.wait(_LOOK_S):
            self._tell(self._position())

    def _tell(self, position: int) -> None:
        if position > self._told:
            self._report.advance(position - self._told)
            self._told = position

    def _position(self) -> int:
        found = []
        try:
            for number in os.listdir("/proc/self/fd"):
                if _target(number) == self._path:
                    lines = Path(f"/proc/self/fdinfo/{number}").read_text()
                    found.append(int(lines.split("pos:")[1].split()[0]))
        except (OSError, ValueError, IndexError):
            return 0
        return min(found, default=0)


def _target(number: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{number}")
    except OSError:  # closed meanwhile
        return ""
