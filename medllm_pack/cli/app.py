"""Where the program begins.

Imports no more than it must: an interrupt before there is a handler is a traceback of Python's.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point of the ``medllm-pack`` script."""
    usual = signal.getsignal(signal.SIGINT)
    if usual != signal.SIG_IGN:  # as in the background of a shell
        # Nothing is begun, and an exception among half-imported modules may get lost.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from medllm_pack.cli import commands, console

    signal.signal(signal.SIGINT, usual)
    console.run(commands.app)
