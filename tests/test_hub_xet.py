"""Publishing by xet: hf_xet takes a folder for its storage, which is a means of its own tests."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub

REPO = "org/clinica"
TOKEN = "hf_canaryXetCanaryXetCanary"
# `local://` and the layout of its folder are not documented; this release was looked at.
KNOWN = "1.8.0"


def installed() -> str:
    try:
        return version("hf-xet")
    except PackageNotFoundError:
        return "none"


pytestmark = pytest.mark.skipif(installed() != KNOWN, reason=f"needs hf-xet {KNOWN}")

SCRIPT = """
import json, sys
from pathlib import Path
from medllm_pack.publish.hub import publish_to_hub
from medllm_pack.publish.make import make_release
from medllm_pack.publish.targets import HubTarget
class Report:
    steps, n_bytes, notices = [], [], []
    def step(self, name, *, total_bytes=None): self.steps.append(name)
    def advance(self, n): self.n_bytes.append(n)
    def notice(self, text): self.notices.append(text)
done = publish_to_hub(make_release(Path(sys.argv[1])), HubTarget(sys.argv[2]), report=Report())
print(json.dumps([done.commit, sum(Report.n_bytes), Report.notices]))
"""


def xet_hash(folder: Path, oid: str) -> str | None:
    """Find the xet hash of a file by its SHA-256 in the shards of a storage folder."""
    for shard in folder.rglob("*.mdb"):
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            name, flags, n = data[at : at + 32], *struct.unpack("<II", data[at + 32 : at + 40])
            at += 48 + 48 * n * (2 if flags & 0x80000000 else 1)
            if flags & 0x40000000:
                if _text(data[at : at + 32]) == oid:
                    return _text(name)
                at += 48
    return None


def _text(data: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", data))


def rebuild(folder: Path, oid: str, size: int) -> bytes:
    """Return a file that was uploaded by xet, as the Hub serves it to who asks without."""
    name = xet_hash(folder, oid)
    if name is None:
        return b""
    out = folder.parent / f"{oid}.rebuilt"
    script = (
        "import sys, hf_xet\n"
        "session = hf_xet.XetSession()\n"
        "with session.new_file_download_group(endpoint=sys.argv[1], token='t',"
        " token_expiry_unix_secs=1 << 40) as group:\n"
        "    group.start_download_file(hf_xet.XetFileInfo(sys.argv[2], int(sys.argv[3])),"
        " sys.argv[4])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script, f"local://{folder}", name, str(size), str(out)],
        check=True, timeout=60,
    )  # fmt: skip
    return out.read_bytes()


def test_weights_go_by_xet_and_arrive_byte_for_byte(built_pack: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cas"
    folder.mkdir()
    with FakeHub() as server:
        server.tokens, server.xet, server.rebuild = {TOKEN}, folder, rebuild
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(built_pack), REPO],
            env={
                **os.environ, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN,
                "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_TELEMETRY": "1", "HF_XET_TELEMETRY_ENABLED": "0",
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert not server.calls("POST", "/objects/batch")
        repository = server.repositories[REPO]
        there = repository.commits[repository.refs["main"]]
    pack = {path.name: path.read_bytes() for path in built_pack.iterdir()}
    assert {name: there[name] for name in pack} == pack
    size = sum(len(data) for name, data in pack.items() if name.endswith(".gguf"))
    assert f", {size}, []]" in done.stdout
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in kept if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in done.stdout + done.stderr
