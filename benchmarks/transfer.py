"""Upload and download of one blob against plain curl, to the same registry in the same run.

    python -m benchmarks.transfer [--mib 1024] [--rounds 2] [--folder DIR] [--secure]

Needs Debian's docker-registry and curl; --secure, which speaks TLS and logs in with a password,
htpasswd too. The peers take turns; the best of each counts. curl compares no digest of what it
fetches and does not wait for the disk; "curl, sha256sum" is what a careful person does. Peak memory
is that of a process of its own that sends or fetches the blob and nothing else.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medllm_pack import files

_LOGIN = ("user", "password")

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
way, host, repository, path, size, digest, state, ca = sys.argv[1:]
target, digest = RegistryTarget("oci", host, repository), Digest(digest)
start = time.monotonic()
with opened(target, Access(ca=Path(ca) if ca else None), push=way == "up") as registry:
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


@dataclass(frozen=True)
class Job:
    """One blob one way.

    Attributes:
        ca: certificate of a registry that speaks TLS and wants the login, else None.
    """

    host: str
    way: str
    path: Path
    size: int
    digest: str
    state: Path
    ca: Path | None = None


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--secure", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        _run(Path(folder), options.mib, options.rounds, secure=options.secure)


def _run(folder: Path, mib: int, rounds: int, *, secure: bool) -> None:
    from tests.registries import Registry

    blob = folder / "blob"
    with blob.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    digest = files.sha256(blob)
    ca, settings = _secured(folder) if secure else (None, {})
    best: dict[tuple[str, str], float] = {}
    peaks: dict[str, float] = {}
    for n in range(rounds):
        # A registry of its own each time: one that has a blob elsewhere would not store it again.
        for who in ("curl", "ours"):
            with Registry(folder / f"registry-{who}-{n}", **settings) as registry:
                _log_in(folder, registry.host)
                for way in ("up", "down"):
                    path = blob if way == "up" else folder / "fetched"
                    job = Job(registry.host, way, path, mib << 20, digest, folder / "state", ca)
                    _keep_best(best, peaks, who, job)
            (folder / "fetched").unlink()
            shutil.rmtree(folder / f"registry-{who}-{n}")
    print(f"{mib} MiB, best of {rounds}{', TLS and password' if secure else ''}")
    for way in ("up", "down"):
        ours, peak = best["ours", way], peaks[way]
        print(f"{way:5} ours {ours:.2f} s, peak {peak:.0f} MiB")
        for who in (who for who, other in best if other == way and who != "ours"):
            print(f"      {who} {best[who, way]:.2f} s: {best[who, way] / ours:.2f} of its speed")


def _keep_best(
    best: dict[tuple[str, str], float], peaks: dict[str, float], who: str, job: Job
) -> None:
    def keep(name: str, seconds: float) -> None:
        best[name, job.way] = min(seconds, best.get((name, job.way), seconds))

    start = time.monotonic()
    if who == "ours":
        seconds, peak = _ours(job)
        keep(who, seconds)
        peaks[job.way] = max(peak, peaks.get(job.way, 0.0))
        return
    _curl(job)
    keep(who, time.monotonic() - start)
    if job.way == "down":
        subprocess.run(["sha256sum", str(job.path)], check=True, stdout=subprocess.DEVNULL)
        keep("curl, sha256sum", time.monotonic() - start)


def _secured(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Make a certificate and a password, and settings of a registry that wants them."""
    from tests.test_registry_logins import certificate

    cert, key = certificate(folder)
    made = subprocess.run(["htpasswd", "-Bbn", *_LOGIN], check=True, capture_output=True).stdout
    (folder / "htpasswd").write_bytes(made)
    os.environ["DOCKER_CONFIG"] = str(folder)
    auth = {"auth": {"htpasswd": {"realm": "x", "path": str(folder / "htpasswd")}}}
    return cert, {"extra": auth, "http": {"tls": {"certificate": str(cert), "key": str(key)}}}


def _log_in(folder: Path, host: str) -> None:
    """Leave the login where `docker login` would."""
    encoded = base64.b64encode(":".join(_LOGIN).encode()).decode()
    logins = {"auths": {host: {"auth": encoded}}}
    (folder / "config.json").write_text(json.dumps(logins))


def _ours(job: Job) -> tuple[float, float]:
    words = [job.way, job.host, "ns/model", str(job.path), str(job.size), job.digest,
             str(job.state), str(job.ca or "")]  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", _OURS, *words], check=True, capture_output=True, text=True
    )
    result = json.loads(ended.stdout)
    return result["seconds"], result["peak_mib"]


def _curl(job: Job) -> None:
    curl = ["curl", "-sS", "-f"]
    if job.ca:
        curl += ["--http1.1", "--cacert", str(job.ca), "-u", ":".join(_LOGIN)]
    base = f"{'https' if job.ca else 'http'}://{job.host}/v2/ns/model/blobs"
    if job.way == "down":
        subprocess.run([*curl, "-o", str(job.path), f"{base}/sha256:{job.digest}"], check=True)
        return
    opened = subprocess.run(
        [*curl, "-o", "/dev/null", "-D", "-", "-X", "POST", f"{base}/uploads/"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    location = next(
        line.split(" ", 1)[1].strip()
        for line in opened.splitlines()
        if line.lower().startswith("location:")
    )
    words = ["-T", str(job.path), "-H", "Content-Type: application/octet-stream", "-X", "PUT"]
    subprocess.run([*curl, *words, f"{location}&digest=sha256:{job.digest}"], check=True)


if __name__ == "__main__":
    main()
