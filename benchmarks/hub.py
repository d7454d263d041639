"""One large file to a Hub of our own and back, against curl to and from the same servers.

    python -m benchmarks.hub [--mib 1024] [--rounds 3] [--folder DIR]

Up goes by LFS to a storage that keeps nothing, down comes from nginx, both on this machine. LFS
wants the digest before the first byte; "known" is a file whose digest this machine remembers, as
after a build. The peers take turns; the best of each counts. Needs nginx and curl. Peak memory is
that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from medllm_pack import files

_COMMIT = "1" * 40
_OURS = """
import json, resource, sys, time
from pathlib import Path
way, endpoint, path, size, digest, folder = sys.argv[1:]
path, size, folder = Path(path), int(size), Path(folder)
from huggingface_hub import HfApi
from medllm_pack.digests import Digest
from medllm_pack.known import Known
from medllm_pack.ollama.image import Blob
from medllm_pack.progress import Silent
from medllm_pack.publish.hub_library import library
from medllm_pack.publish.hub_upload import Upload
from medllm_pack.weights.answers import HUB, Address
from medllm_pack.weights.cache import Cache, Item
from medllm_pack.weights.download import Download
address = Address("ns/model", "main", endpoint)
if way == "up, known":
    Known().digest(path)
start = time.monotonic()
if way.startswith("up"):
    with library():
        upload = Upload(HfApi(endpoint=endpoint, token="t"), address, Silent())
        upload.send({"weights.gguf": Blob("x", Digest(digest), size, path)})
else:
    cache = Cache(folder, name="ns/model", revision="main")
    item = Item("weights.gguf", size, digest)
    Download(item, "1" * 40, address, cache, HUB, Silent()).run()
seconds = time.monotonic() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": seconds, "peak_mib": peak}))
"""


class _Hub(BaseHTTPRequestHandler):
    """As much of a Hub as one file needs; what is put is read and forgotten."""

    protocol_version = "HTTP/1.1"
    storage = ""

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:  # noqa: N802
        wanted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "/preupload/" in self.path:
            modes = {"uploadMode": "lfs", "shouldIgnore": False, "oid": None}
            self._answer({"files": [{"path": f["path"], **modes} for f in wanted["files"]]})
        else:
            upload = {"href": f"http://{self.headers['Host']}/up"}
            objects = [{**o, "actions": {"upload": upload}} for o in wanted["objects"]]
            self._answer({"transfer": "basic", "objects": objects})

    def do_PUT(self) -> None:  # noqa: N802
        left, buffer = int(self.headers["Content-Length"]), memoryview(bytearray(1 << 20))
        while left:
            left -= self.rfile.readinto(buffer[:left])
        self._answer({})

    def do_GET(self) -> None:  # noqa: N802
        self.send_response(302)
        self.send_header("Location", self.storage)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _answer(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _serve(storage: str, ports: Any) -> None:
    _Hub.storage = storage
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    ports.put(server.server_port)
    server.serve_forever()


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.environ |= {
            "HOME": folder, "XDG_STATE_HOME": folder, "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        _run(Path(folder), options.mib, options.rounds)


def _run(folder: Path, mib: int, rounds: int) -> None:
    from tests.registries import free_port, run_nginx, wait_for

    blob, port = folder / "blob", free_port()
    with blob.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1 << 20))
    digest = files.sha256(blob)
    block = f"server {{ listen 127.0.0.1:{port}; sendfile on; root {folder}; }}"
    nginx = run_nginx(folder / "nginx", block)
    wait_for(port)
    ports: Any = multiprocessing.Queue()
    storage = f"http://127.0.0.1:{port}/blob"
    hub = multiprocessing.Process(target=_serve, args=(storage, ports), daemon=True)
    hub.start()
    endpoint = f"http://127.0.0.1:{ports.get()}"
    put = ["-T", str(blob), f"{endpoint}/up"]
    get = ["-o", str(folder / "fetched"), storage]
    known = (folder / "medllm-pack/known").glob

    def ours(way: str) -> tuple[float, float]:
        for entry in known("*"):
            entry.unlink()
        words = [way, endpoint, str(blob), str(mib << 20), digest, str(folder / "cache")]
        made = subprocess.run([sys.executable, "-c", _OURS, *words], check=True,
                              capture_output=True, text=True)  # fmt: skip
        result = json.loads(made.stdout)
        subprocess.run(["rm", "-rf", str(folder / "cache")], check=True)
        return result["seconds"], result["peak_mib"]

    try:
        _compare(
            rounds,
            {
                "up   curl": lambda: _timed(["curl", "-sSf", *put]),
                "up   ours, known": lambda: ours("up, known"),
                "up   ours": lambda: ours("up"),
                "     sha256sum": lambda: _timed(["sha256sum", str(blob)]),
                "down curl": lambda: _timed(["curl", "-sSf", *get]),
                "down ours": lambda: ours("down"),
            },
        )
    finally:
        hub.terminate()
        nginx.terminate()
        nginx.wait()


def _compare(rounds: int, jobs: dict[str, Callable[[], tuple[float, float]]]) -> None:
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, job in jobs.items():
            best[name] = min(job(), best.get(name, (float("inf"), 0.0)))
    for name, (seconds, peak) in best.items():
        ratio = best[f"{name[:5]}curl"][0] / seconds if name[:1] != " " else 0.0
        said = f"  {ratio:.2f} of curl's speed, peak {peak:.0f} MiB" if "ours" in name else ""
        print(f"{name:18} {seconds:5.2f} s{said}")


def _timed(words: list[str]) -> tuple[float, float]:
    start = time.monotonic()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start, 0.0


if __name__ == "__main__":
    main()
