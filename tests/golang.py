"""The Go programs of the tests, built once and offline."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


def built(name: str, folder: Path) -> Path:
    """Build tests/NAME into a folder and return the program."""
    go = shutil.which("go")
    if go is None:
        pytest.skip("go is not installed; Debian has it as golang-go")
    program = folder / name
    command = [go, "build", "-o", str(program), "main.go"]
    offline = {"GO111MODULE": "off", "GOFLAGS": "", "GOTOOLCHAIN": "local", "GOPROXY": "off"}
    source = Path(__file__).parent / name
    subprocess.run(command, cwd=source, env=os.environ | offline, check=True)
    return program
