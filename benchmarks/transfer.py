"""Upload and download of one blob against plain curl, to the same registry in the same run.

    python benchmarks/transfer.py [--mib 1024] [--rounds 2] [--folder DIR]

Needs Debian's docker-registry and curl. Ours and curl take turns; the best of each counts. Peak
memory is that of a process of its own that sends or fetches the blob and nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from medllm_pack import files

_OURS = """
import json, resource, sys, time
from pathlib import Path
from medllm_pack.digests import Digest
from medllm_pack.ollama.image import Blob
from medllm_pack.publish.download import fetch_blob
from medllm_pack.publish.journal import Journal
from medllm_pack.publish.registry import opened
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access
from medllm_pack.publish.upload import CHUNK, Sending, send_blob
import threading
way, host, repository, path, size, digest, state = sys.argv[1:]
target, digest = RegistryTarget("oci", host, repository), Digest(digest)
start = time.monotonic()
with opened(target, Access(), push=way == "up") as registry:
    if way == "up":
        journal = Journal(registry.origin, repository, folder=Path(state))
        sending = Sending(registry, journal, CHUNK, threading.Event(), lambda _: None)
        send_blob(Blob("x", digest, int(size), Path(path)), sending)
    else:
        fetch_blob(registry, digest, int(size), Path(path), lambda _: None)
seconds = time.monotonic() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak_mib": peak}))
"""


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _run(Path(folder), options.mib, options.rounds)


def _run(folder: Path, mib: int, rounds: int) -> None:
    from tests.registries import Registry

    blob = folder / "blob"
    with blob.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    digest = files.sha256(blob)
    best: dict[tuple[str, str], float] = {}
    peaks: dict[str, float] = {}
    for n in range(rounds):
        # A registry of its own each time: one that has a blob elsewhere would not store it again.
        for who in ("curl", "ours"):
            with Registry(folder / f"registry-{who}-{n}") as registry:
                for way in ("up", "down"):
                    path = blob if way == "up" else folder / "fetched"
                    seconds, peak = _RUN[who](
                        registry.host, way, path, mib << 20, digest, folder / "state"
                    )
                    best[who, way] = min(seconds, best.get((who, way), seconds))
                    peaks[way] = max(peak, peaks.get(way, 0.0)) if who == "ours" else 0.0
                (folder / "fetched").unlink()
    print(f"{mib} MiB, best of {rounds}")
    for way in ("up", "down"):
        curl, ours = best["curl", way], best["ours", way]
        print(
            f"{way:5} curl {curl:6.2f} s  ours {ours:6.2f} s  speed {curl / ours:.2f} of curl's  "
            f"peak {peaks[way]:.0f} MiB"
        )


def _ours(
    host: str, way: str, path: Path, size: int, digest: str, state: Path
) -> tuple[float, float]:
    words = [way, host, "ns/model", str(path), str(size), digest, str(state)]
    ended = subprocess.run(
        [sys.executable, "-c", _OURS, *words], check=True, capture_output=True, text=True
    )
    result = json.loads(ended.stdout)
    return result["seconds"], result["peak_mib"]


def _curl(
    host: str, way: str, path: Path, size: int, digest: str, state: Path
) -> tuple[float, float]:
    base = f"http://{host}/v2/ns/model/blobs"
    start = time.monotonic()
    if way == "up":
        opened = subprocess.run(
            ["curl", "-sS", "-o", "/dev/null", "-D", "-", "-X", "POST", f"{base}/uploads/"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        location = next(
            line.split(" ", 1)[1].strip()
            for line in opened.splitlines()
            if line.lower().startswith("location:")
        )
        words = ["-T", str(path), "-H", "Content-Type: application/octet-stream", "-X", "PUT",
                 f"{location}&digest=sha256:{digest}"]  # fmt: skip
    else:
        words = ["-o", str(path), f"{base}/sha256:{digest}"]
    subprocess.run(["curl", "-sS", "-f", *words], check=True)
    return time.monotonic() - start, 0.0


_RUN: dict[str, Callable[[str, str, Path, int, str, Path], tuple[float, float]]] = {
    "curl": _curl,
    "ours": _ours,
}

if __name__ == "__main__":
    main()
