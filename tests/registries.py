"""Debian's docker-registry and nginx on free ports of the loopback, and small releases to send."""

from __future__ import annotations

import json
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx
import pytest

from medllm_pack.ollama import create
from medllm_pack.ollama.image import DOCKER_MANIFEST, Blob, Image
from medllm_pack.patience import Patience
from medllm_pack.publish.papers import attach, media_type
from medllm_pack.publish.release import Release, Tagged
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access

QUICK = Patience(tries=5, first_wait_s=0.02, longest_wait_s=0.2, stall_s=10)
ACCESS = Access(patience=QUICK)


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip, naming the Debian programs that are missing."""
    missing = [p for p in programs if not (shutil.which(p) or Path("/usr/sbin", p).exists())]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    end = time.monotonic() + 15
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)


@dataclass
class Registry:
    """A docker-registry process; it may be stopped, killed and started again."""

    folder: Path
    extra: Mapping[str, Any] = field(default_factory=dict)
    http: Mapping[str, Any] = field(default_factory=dict)
    storage: Mapping[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def target(self, repository: str = "ns/model", tag: str | None = None) -> RegistryTarget:
        return RegistryTarget("oci", self.host, repository, tag)

    def start(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        config = {
            "version": "0.1",
            "log": {"level": "error", "accesslog": {"disabled": True}},
            "storage": {
                "filesystem": {"rootdirectory": str(self.folder / "store")},
                "delete": {"enabled": True},
                "maintenance": {"uploadpurging": {"enabled": False}},
                **self.storage,
            },
            "http": {"addr": self.host, "secret": "fixed", **self.http},
            **self.extra,
        }
        (self.folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                ["docker-registry", "serve", str(self.folder / "config.yml")],
                stdout=log, stderr=log,
            )  # fmt: skip
        wait_for(self.port)
        return self

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait()
            self.process = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def get(self, path: str, **headers: str) -> httpx.Response:
        url = f"http://{self.host}/v2/{path}"
        return httpx.get(url, headers=headers, trust_env=False)

    def check_whole(self, repository: str = "ns/model") -> dict[str, str]:
        """Return tag -> digest; every tag's manifest must have all its blobs, with their bytes."""
        tags = self.get(f"{repository}/tags/list").json().get("tags") or []
        found = {}
        for tag in tags:
            answer = self.get(
                f"{repository}/manifests/{tag}",
                Accept=f"{DOCKER_MANIFEST}, application/vnd.oci.image.index.v1+json",
            )
            assert answer.status_code == 200, tag
            found[tag] = answer.headers["Docker-Content-Digest"]
            document = answer.json()
            for entry in document.get("manifests", []):
                path = f"{repository}/manifests/{entry['digest']}"
                assert self.get(path, Accept=entry["mediaType"]).status_code == 200
            for entry in [*document.get("layers", []), *filter(None, [document.get("config")])]:
                blob = self.get(f"{repository}/blobs/{entry['digest']}")
                assert (blob.status_code, len(blob.content)) == (200, entry["size"])
        return found


def run_nginx(folder: Path, server: str) -> subprocess.Popen[bytes]:
    """Start nginx in the foreground with one or more server blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    temp = "".join(
        f"{kind}_temp_path {folder}/{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;\n"
        f"events {{}}\nhttp {{ access_log off; {temp}\n{server}\n}}\n"
    )
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    return subprocess.Popen(
        [nginx, "-p", str(folder), "-c", str(config)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def image(weights: Path | bytes, *, quant: str = "F16", system: str = "Seja breve.") -> Image:
    """An image as Ollama makes them, around any bytes."""
    data = weights.read_bytes() if isinstance(weights, Path) else weights
    model = Blob.of(data, create.MODEL)
    if isinstance(weights, Path):
        model = Blob(create.MODEL, model.digest, model.size, weights)
    layers = (model, Blob.of(system.encode(), create.SYSTEM))
    config = Blob.of(
        json.dumps({"model_format": "gguf", "file_type": quant}).encode(),
        "application/vnd.docker.container.image.v1+json",
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": config.descriptor(),
        "layers": [layer.descriptor() for layer in layers],
    }
    return Image(DOCKER_MANIFEST, json.dumps(manifest).encode(), config, layers)


def release(folder: Path, *, size: int = 300_000, quants: tuple[str, ...] = ("f16",)) -> Release:
    """A release of random weights in files, with papers attached; the last variant is default."""
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for n, quant in enumerate(quants):
        path = folder / f"m-{quant}.gguf"
        path.write_bytes(random.Random(f"{folder.name}{n}{size}").randbytes(size))
        made = image(path, quant=quant.upper())
        papers = {"README.md": Blob.of(b"# card\n", media_type("README.md"))}
        tags = (f"7b-{quant}", "7b") if quant == quants[-1] else (f"7b-{quant}",)
        images.append(Tagged(quant, tags, made, (attach(made, papers),)))
    return Release(tuple(images))
