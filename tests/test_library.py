"""docs/library.md, run as it stands: in a thread, with no word on the terminal."""

from __future__ import annotations

import inspect
import re
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from medllm_pack.progress import SILENT

ROOT = Path(__file__).resolve().parent.parent
FUNCTION = re.compile(r"`(?:medllm_pack\.)?((?:pack|parity|publish)(?:\.\w+)+)")
NEVER_RAISE = "publish.verify_published.verify_bundle"  # what is wrong is a check that says no
BLOCK = re.compile(r"```python( parity)?\n(.*?)```", re.DOTALL)


def blocks(*, parity: bool) -> list[str]:
    text = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    return [code for kind, code in BLOCK.findall(text) if bool(kind) is parity]


def test_examples_run_in_a_thread_and_print_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    raised: list[BaseException] = []
    handler = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def run() -> None:
        try:
            for code in blocks(parity=False):
                exec(compile(code, "docs/library.md", "exec"), names)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]
    assert names["notes"] == []
    assert "exists" in names["problems"][0]
    assert names["exit_code"] == 1
    assert names["failed"] == []
    assert names["listener"].done > names["size"]
    assert (tmp_path / "pack.tar").is_file()
    assert capfd.readouterr() == ("", "")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handler


def test_names_of_the_parity_example_exist() -> None:
    """It runs a minute, and test_parity.py calls the same function in the same way."""
    from medllm_pack.parity.run import Result, check_pack

    (code,) = blocks(parity=True)
    compile(code, "docs/library.md", "exec")
    assert check_pack.__name__ in code
    assert hasattr(Result, "raise_if_failed")


def test_import_warns_of_nothing_and_prints_nothing() -> None:
    modules = "medllm_pack, medllm_pack.pack.build, medllm_pack.publish.push"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {modules}, medllm_pack.parity.run"],
        capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_functions_that_take_long_are_silent_by_default_and_say_what_they_raise() -> None:
    text = (ROOT / "docs/library.md").read_text(encoding="utf-8")
    names = FUNCTION.findall(text)
    assert len(names) == 19
    for name in names:
        module, _, function = name.rpartition(".")
        found = getattr(import_module(f"medllm_pack.{module}"), function)
        listener = inspect.signature(found).parameters["report"]
        assert listener.default is SILENT, name
        assert listener.kind is listener.KEYWORD_ONLY, name
        if name not in NEVER_RAISE:
            assert "Raises:" in found.__doc__, name
