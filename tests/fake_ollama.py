"""An Ollama server for tests: /api/version, tags, blobs, create, show and generate over a store.

Behaves as server/routes.go, server/create.go and the runners say, written anew with gguf-py and
json; llama.cpp tokenizes and computes. Knows nothing of the package but its door to llama.cpp.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from gguf import GGUFReader, LlamaFileType

from medllm_pack.parity.llamacpp import Model

Counts = Literal["all", "new", "nothing"]

_DIGEST = re.compile(r"sha256:[0-9a-fA-F]{64}")


class Ollama(ThreadingHTTPServer):
    """A server; ``requests`` holds method and path of everything that was asked.

    Args:
        root: of its store.
        counts: which tokens of a prompt it says that it read: all, as since 0.2; without those that
            it had kept from the prompt before, as some versions; or not how many.
    """

    daemon_threads = True

    def __init__(self, root: Path, *, counts: Counts = "all") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.counts, self.kept = counts, list[int]()
        self.root = root
        self.requests: list[tuple[str, str]] = []
        self.received = 0
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A handler that fails cuts the connection, as a server that died."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest.replace(":", "-")

    def manifests(self) -> Iterator[tuple[str, bytes]]:
        for path in sorted((self.root / "manifests").glob("*/*/*/*")):
            host, namespace, model, tag = path.relative_to(self.root / "manifests").parts
            shortest = model if namespace == "library" else f"{namespace}/{model}"
            yield (
                (shortest if host == "registry.ollama.ai" else f"{host}/{namespace}/{model}")
                + f":{tag}",
                path.read_bytes(),
            )

    def layer(self, model: str, kind: str) -> Path | None:
        """Return the blob of a model's first layer of a kind."""
        for name, data in self.manifests():
            for layer in json.loads(data)["layers"]:
                if name == model and layer["mediaType"].endswith(f".{kind}"):
                    return self.blob(layer["digest"])
        return None

    def template(self, model: str) -> str:
        path = self.layer(model, "template")
        return path.read_text(encoding="utf-8") if path else "{{ .Prompt }}"

    def render(self, model: str, prompt: str) -> str:
        """Return what the model gets to read, for templates without conditions."""
        system = self.layer(model, "system")
        text = self.template(model).partition("{{ .Response }}")[0]
        if system:
            text = text.replace("{{ .System }}", system.read_text(encoding="utf-8"))
        return text.replace("{{ .Prompt }}", prompt)

    def count(self, ids: list[int]) -> dict[str, int]:
        """Return what an answer says about the length of the prompt; 0 is left out."""
        known = 0
        if self.counts == "new":
            known = len(os.path.commonprefix([self.kept, ids]))
            known = min(known, len(ids) - 1)  # the last one is needed to go on
        self.kept = ids
        return {} if self.counts == "nothing" else {"prompt_eval_count": len(ids) - known}

    def new_layer(self, data: bytes, kind: str) -> dict[str, Any]:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blob(digest).write_bytes(data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}


class _Handler(BaseHTTPRequestHandler):
    server: Ollama
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, document: Any = None) -> None:
        data = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:  # noqa: N802
        self.server.requests.append(("GET", self.path))
        if self.path == "/api/version":
            self.answer(200, {"version": "0.99.0"})
        elif self.path == "/api/tags":
            models = [
                {"name": name, "model": name, "digest": hashlib.sha256(data).hexdigest()}
                for name, data in self.server.manifests()
            ]
            self.answer(200, {"models": models})
        else:
            self.answer(404)

    def do_HEAD(self) -> None:  # noqa: N802
        self.server.requests.append(("HEAD", self.path))
        digest = self.path.removeprefix("/api/blobs/")
        if not _DIGEST.fullmatch(digest):
            self.answer(400)
        else:
            self.answer(200 if self.server.blob(digest).exists() else 404)

    def do_POST(self) -> None:  # noqa: N802
        self.server.requests.append(("POST", self.path))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/blobs/"):
            self.create_blob(self.path.removeprefix("/api/blobs/"), body)
        elif self.path == "/api/create":
            self.create(json.loads(body))
        elif self.path == "/api/show":
            self.show(json.loads(body)["model"])
        elif self.path == "/api/generate":
            self.generate(json.loads(body))
        else:
            self.answer(404)

    def create_blob(self, digest: str, body: bytes) -> None:
        self.server.received += len(body)
        if "sha256:" + hashlib.sha256(body).hexdigest() != digest:
            self.answer(400, {"error": f'digest mismatch, expected "{digest}"'})
            return
        self.server.blob(digest).write_bytes(body)
        self.answer(201)

    def create(self, request: dict[str, Any]) -> None:
        ((name, digest),) = request["files"].items()
        path = self.server.blob(digest)
        if not path.exists():
            self.answer(400, {"error": f"blob not found for {name}"})
            return
        reader = GGUFReader(path)
        family = reader.fields["general.architecture"].contents()
        number = reader.fields["general.file_type"].contents()
        parameters = int(sum(tensor.n_elements for tensor in reader.tensors))
        kind = "application/vnd.ollama.image."
        layers = [
            {"mediaType": kind + "model", "digest": digest, "size": path.stat().st_size}
            | {"from": name}
        ]
        for key in ("template", "system"):
            if request.get(key):
                layers.append(self.server.new_layer(request[key].encode(), kind + key))
        for text in request.get("license", []):
            layers.append(self.server.new_layer(text.encode(), kind + "license"))
        if request.get("parameters"):
            layers.append(
                self.server.new_layer(encode(request["parameters"], sort=True), kind + "params")
            )
        config = {
            "model_format": "gguf", "model_family": family, "model_families": [family],
            "model_type": f"{parameters / 1e6:.2f}M",
            "file_type": LlamaFileType(number).name.removeprefix("MOSTLY_"),
        }  # fmt: skip
        media_type = "application/vnd.docker.container.image.v1+json"
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": self.server.new_layer(encode(config), media_type),
            "layers": layers,
        }
        self.write_manifest(request["model"], encode(document))
        self.answer(200, {"status": "success"})

    def show(self, model: str) -> None:
        weights = self.server.layer(model, "model")
        if weights is None:
            self.answer(404, {"error": f"model '{model}' not found"})
            return
        template = self.server.template(model)
        text = f'# Modelfile\nFROM {weights}\nTEMPLATE """{template}"""\n'
        self.answer(200, {"modelfile": text, "template": template})

    def generate(self, request: dict[str, Any]) -> None:
        weights, prompt = self.server.layer(request["model"], "model"), request["prompt"]
        if weights is None:
            self.answer(404, {"error": f"model '{request['model']}' not found"})
            return
        if not request["raw"]:
            prompt = self.server.render(request["model"], prompt)
        with Model(weights, threads=1) as model:
            ids = model.tokenize(prompt, special=True)  # as the runners: control tokens count
            new = model.continue_greedily(ids, tokens=request["options"]["num_predict"])
            text = model.detokenize(new)
        self.answer(200, {"response": text, "done": True} | self.server.count(ids))

    def write_manifest(self, name: str, data: bytes) -> None:
        model, _, tag = name.partition(":")
        namespace, _, model = model.rpartition("/")
        path = self.server.root / "manifests/registry.ollama.ai" / (namespace or "library")
        path = path / model / (tag or "latest")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def encode(value: Any, *, sort: bool = False) -> bytes:
    """Return JSON as Go writes it, for the plain texts and numbers of the tests."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=sort)
    return (text + "\n").encode()


@contextmanager
def serving(root: Path, *, counts: Counts = "all") -> Iterator[Ollama]:
    """Run a server over a store."""
    server = Ollama(root, counts=counts)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
