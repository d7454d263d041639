"""The terminal as it is found: other locales, a full disk behind standard output."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medllm_pack.cli import console

ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "medllm_pack", *arguments],
        env=os.environ | ASCII, stdout=stdout, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip


def test_text_that_the_locale_lacks_does_not_end_the_command() -> None:
    done = command("recipes", "show", "7b")
    assert done.returncode == 0, done.stderr
    assert b"Jo?o Gabriel" in done.stdout


def test_json_is_json_in_any_locale() -> None:
    done = command("recipes", "show", "7b", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["card"]["authors"][0].startswith("João")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
def test_full_disk_behind_standard_output_is_one_line(options: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        done = command("recipes", "show", "7b", *options, stdout=full.fileno())
    assert done.returncode == 1
    lines = done.stderr.decode().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: standard output cannot be written: No space left")


def test_memory_that_runs_out_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def greedy() -> None:
        np.empty(1 << 62, dtype=np.uint8)

    with pytest.raises(SystemExit) as ended:
        console.run(greedy)
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: memory ran out")


@pytest.mark.parametrize("started", [0, 2, 5])
def test_thread_that_cannot_be_started_is_one_line_and_leaves_nothing(
    started: int, tmp_path: Path
) -> None:
    code = (
        "import sys, threading\n"
        "start, left = threading._start_new_thread, int(sys.argv.pop(1))\n"
        "def limited(*given):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if left < 0:\n"
        '        raise RuntimeError("can\'t start new thread")\n'  # as a limit is told
        "    return start(*given)\n"
        "threading._start_new_thread = limited\n"
        "from medllm_pack.cli.app import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(started), "build", "tiny", "--out=p", "--quiet"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith("error: no more threads or processes may be started (ulimit -u")
    assert list(tmp_path.iterdir()) == []


def test_process_that_cannot_be_started_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def forks() -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    with pytest.raises(SystemExit) as ended:
        console.run(forks)
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: no more threads or processes")


def test_error_that_nobody_knows_is_left_alone() -> None:
    """Its traceback is what a report of it needs."""

    def mistaken() -> None:
        raise RuntimeError("dictionary changed size during iteration")

    with pytest.raises(RuntimeError, match="changed size"):
        console.run(mistaken)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGHUP])
def test_signals_are_the_callers_again_when_the_command_line_returns(name: signal.Signals) -> None:
    """A test that ran it, or whoever embeds it, could no longer be terminated."""
    seen = []
    usual = signal.signal(name, signal.SIG_DFL)  # a test under nohup is to ignore SIGHUP
    try:
        with pytest.raises(SystemExit):
            console.run(lambda: seen.append(signal.getsignal(name)))
        seen.append(signal.getsignal(name))
    finally:
        signal.signal(name, usual)
    assert seen[0] != seen[1] == signal.SIG_DFL


def test_interrupt_while_the_commands_are_imported_is_no_traceback() -> None:
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in the background
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        "from medllm_pack.cli.app import main\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_interrupt_before_the_command_has_begun_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        console.run(interrupted)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; nothing half-written was kept\n"
