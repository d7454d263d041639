"""publish, pull and inspect with hf:// targets, as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub

TARGET = "hf://org/clinica"
TOKEN = "hf_canaryCliCanaryCliCanary"
GATE = ("--accept", "parity-missing")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def server() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.tokens = {TOKEN}
        yield fake


@pytest.fixture
def run(server: FakeHub, tmp_path: Path) -> Run:
    def run(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "medllm_pack", *map(str, arguments)],
            env={
                **os.environ, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN,
                "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert TOKEN not in done.stdout + done.stderr
        return done

    return run


def test_there_and_back_and_a_look_between(
    server: FakeHub, run: Run, built_pack: Path, tmp_path: Path
) -> None:
    dry = json.loads(run("publish", built_pack, TARGET, *GATE, "--dry-run", "--json").stdout)
    assert dry["dry_run"]
    assert not server.repositories

    done = run("publish", built_pack, TARGET, *GATE)
    assert "ollama run hf.co/org/clinica:Q4_K_M" in done.stdout
    assert "add ~/.ollama/id_ed25519.pub at https://huggingface.co/settings/keys" in done.stderr
    assert server.repositories["org/clinica"].private
    there = server.repositories["org/clinica"].commits
    [record] = {files.get("publication.json") for files in there.values()} - {None}
    assert record is not None
    assert "parity-missing" in record.decode()

    again = json.loads(run("publish", built_pack, TARGET, *GATE, "--json").stdout)
    assert again["sent"] == []
    assert dry["files"].keys() == again["files"].keys()

    look = json.loads(run("inspect", TARGET, "--json").stdout)
    assert {file["file"]: file["sha256"] for file in look["files"]} == {
        variant["file"]: variant["sha256"] for variant in look["pack"]["variants"]
    }
    shown = run("inspect", TARGET).stdout
    assert all(file["sha256"] in shown for file in look["files"])

    pulled = json.loads(run("pull", TARGET, "--out", tmp_path / "back", "--json").stdout)
    assert pulled["commit"] == again["commit"] == look["commit"]
    assert pulled["overrides"] == ["parity-missing"]
    assert "in spite of parity-missing" in run("verify", TARGET).stdout
    back = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    assert back == {path.name: path.read_bytes() for path in built_pack.iterdir()}


def test_the_gate_stands_before_the_hub(server: FakeHub, run: Run, built_pack: Path) -> None:
    done = run("publish", built_pack, TARGET, code=3)
    assert "parity" in done.stderr
    assert not server.requests


def test_a_refusal_is_one_line(server: FakeHub, run: Run, built_pack: Path) -> None:
    server.read_only = {TOKEN}
    done = run("publish", built_pack, TARGET, *GATE, code=1)
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: you may not write to org/clinica: ")
    [line] = run("pull", "hf://org/none", "--out", "x", code=1).stderr.strip().splitlines()
    assert "org/none is not on the Hub, or it is private" in line
    assert "hf://" in run("pull", "oci://h/a/b", "--quant", "f16", "--out", "x", code=2).stderr
