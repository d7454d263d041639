"""What the terminal shows: progress and notices on standard error, results on standard output.

The only place that prints, and with ``main`` the only one that ends the process. Under ``--json``
standard output holds one JSON object and nothing else. rich is imported when something is drawn.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from medllm_pack.errors import MedllmError, WriteError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.progress import Progress, TaskID


# Linux mostly kills instead; a limit of a shell or a batch system (ulimit -v) is told.
_NO_MEMORY = (
    "memory ran out, or a limit on it was met; fewer --threads need less, and `medllm-pack plan` "
    "says how much a build needs"
)
_NO_THREAD = (
    "no more threads or processes may be started (ulimit -u, or pids.max of a container); "
    "raise that limit, or ask for fewer --threads"
)


@dataclass(frozen=True)
class Output:
    """How results are shown: for people, or as one JSON object.

    Attributes:
        json: one object on standard output instead of tables.
        quiet: no progress, no notices.
        verbose: also what is usually not of interest.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def result(self, document: dict[str, Any], show: Callable[[], None]) -> None:
        """Print a result: the document under --json, else whatever ``show`` prints."""
        try:
            if self.json:
                _write_json(document)
            else:
                show()
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has seen enough
            raise
        except OSError as error:
            if error.filename is not None:
                raise
            raise WriteError(
                f"standard output cannot be written: {error.strerror}; the work itself is done"
            ) from error

    def line(self, text: str = "") -> None:
        """Print a line of the result."""
        print(text)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; columns whose name starts with ``>`` are aligned to the right."""
        heads = [column.removeprefix(">") for column in columns]
        cells = [heads, *rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
        for row in cells:
            padded = (
                cell.rjust(width) if column.startswith(">") else cell.ljust(width)
                for cell, width, column in zip(row, widths, columns, strict=True)
            )
            print("  ".join(padded).rstrip())

    @contextmanager
    def reporter(self) -> Iterator[Terminal]:
        """Yield a reporter that draws on standard error until the block ends."""
        terminal = Terminal(quiet=self.quiet)
        try:
            yield terminal
        finally:
            terminal.close()


class Terminal:
    """A :class:`~medllm_pack.progress.Reporter` that draws one bar a step with bytes and rate."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._console: Console | None = None
        self.started = time.monotonic()

    def step(self, name: str, *, total_bytes: int | None = None) -> None:
        """Begin a step and finish the last one."""
        if self.quiet:
            return
        progress = self._bars()
        if self._task is not None:
            progress.update(self._task, total=progress.tasks[self._task].completed or 1)
        self._task = progress.add_task(name, total=total_bytes)

    def advance(self, n_bytes: int) -> None:
        """Move the bar of the current step."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, n_bytes)

    def notice(self, text: str) -> None:
        """Print a notice above the bars."""
        if not self.quiet:
            self._stderr().print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bars away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _stderr(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    def _bars(self) -> Progress:
        if self._progress is None:
            from rich import progress as bars

            self._progress = bars.Progress(
                bars.TextColumn("{task.description}"), bars.BarColumn(),
                bars.DownloadColumn(), bars.TransferSpeedColumn(), bars.TimeRemainingColumn(),
                console=self._stderr(), transient=True,
            )  # fmt: skip
            self._progress.start()
        return self._progress


def _write_json(document: dict[str, Any]) -> None:
    from medllm_pack.files import canonical_json

    text = canonical_json(document)
    if "utf" not in (sys.stdout.encoding or "").lower():
        import json

        text = json.dumps(document, sort_keys=True) + "\n"  # all in ASCII, and still JSON
    sys.stdout.write(text)


def _told(error: Exception) -> MedllmError | None:
    """Return what the user is told of an error; None if it is a mistake of the program."""
    match error:
        case MedllmError():
            return error
        case MemoryError():
            return MedllmError(_NO_MEMORY)
        case RuntimeError(args=("can't start new thread",)) | BlockingIOError(errno=errno.EAGAIN):
            return MedllmError(_NO_THREAD)
    return None


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let a terminated process clean up like an interrupted one, until the block ends.

    So does one whose terminal is gone, unless it was started to survive that (nohup).
    """
    usual = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGHUP)}
    ours = [name for name, handler in usual.items() if handler != signal.SIG_IGN]
    try:
        for name in ours:
            signal.signal(name, lambda number, _: sys.exit(128 + number))
        yield
    finally:
        for name in ours:
            signal.signal(name, usual[name])


def run(command: Callable[[], object]) -> NoReturn:
    """Run the command line; the one place where an error becomes text and an exit code."""
    for stream in (sys.stdout, sys.stderr):
        # In a locale without UTF-8 a sign that it lacks must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        with _ending_on_signals():
            command()
    except Exception as error:
        told = _told(error)
        if told is None:
            raise
        if os.environ.get("MEDLLM_DEBUG") == "1":
            traceback.print_exception(error)
        for line in told.lines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(told.exit_code)
    except (KeyboardInterrupt, SystemExit) as ended:
        code = ended.code if isinstance(ended, SystemExit) else 130
        if code == 130:
            print("interrupted; nothing half-written was kept", file=sys.stderr)
        sys.exit(code)
    sys.exit(0)
