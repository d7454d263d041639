"""A Hugging Face Hub on the loopback, with a storage host on another port, and faults to switch on.

Speaks what the real huggingface_hub client asks for when it reads: repository information, the
tree, and files, small ones directly and large ones by redirect to a signed address of the storage
host. Such an address works once. It is written to by LFS, basic or in parts, and by commits that
may name their parent. Every request is recorded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin", ".model", ".gguf")  # what a Hub repository's .gitattributes says
_CHUNK = 64 << 10


@dataclass
class Request:
    """A request that arrived, and what was answered."""

    server: str
    method: str
    path: str
    headers: dict[str, str]
    status: int = 0
    name: str = ""
    body_bytes: int = 0

    @property
    def start(self) -> int:
        """First byte that was asked for."""
        match = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("range", ""))
        return int(match[1]) if match else 0

    @property
    def stop(self) -> int | None:
        """Byte behind the last one that was asked for."""
        match = re.fullmatch(r"bytes=\d+-(\d+)", self.headers.get("range", ""))
        return int(match[1]) + 1 if match else None


@dataclass
class Faults:
    """What goes wrong. Lists are used up, one entry an answer."""

    gated: bool = False
    gone: set[str] = field(default_factory=set)  # listed, yet 404
    api_errors: list[int] = field(default_factory=list)
    hub_errors: list[int] = field(default_factory=list)
    storage_errors: list[int] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)  # bytes of the body
    stall_after: list[int] = field(default_factory=list)
    ignore_range: bool = False
    wrong_ranges: int = 0
    wrong_bytes: set[str] = field(default_factory=set)
    flipped: set[str] = field(default_factory=set)  # the last byte is another
    extra_bytes: int = 0
    etags: dict[str, str] = field(default_factory=dict)  # announced instead of the right one
    sizes: dict[str, int] = field(default_factory=dict)  # listed instead of the right one
    seconds_per_chunk: float = 0.0
    retry_after: str = ""  # with errors of the API and of the storage
    trickle: int = 0  # bytes of a body that come one by one
    redirect_to: str = ""  # instead of the storage host
    part_size: int = 0  # of uploads in parts; 0 for whole files
    put_errors: list[int] = field(default_factory=list)
    cut_puts: list[int] = field(default_factory=list)  # bytes that are read of an upload
    commit_errors: list[int] = field(default_factory=list)
    lost_answers: int = 0  # commits that are made, and the answer lost
    other_commits: int = 0  # commits by others just before ours
    wrong_commits: int = 0  # commits that hold other bytes than were sent
    bad_metadata: bool = False
    requests_left: int | None = None  # after so many, connections are cut without an answer


@dataclass
class Repository:
    """Commits and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False

    def commit(self, files: Mapping[str, bytes], *, ref: str = "main") -> str:
        """Add a commit and move ``ref`` to it."""
        identity = repr(sorted((name, sha256(data)) for name, data in files.items()))
        sha = hashlib.sha1(identity.encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs[ref] = sha
        return sha


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def etag(name: str, data: bytes) -> str:
    """Return the digest by which the Hub and the cache call a file."""
    if name.endswith(LFS):
        return sha256(data)
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """The server; use it as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults = Faults()
        self.tokens: set[str] = set()
        self.read_only: set[str] = set()
        self.stored: dict[str, bytes] = {}  # what was uploaded by LFS, by SHA-256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.xet: Path | None = None  # a folder that hf_xet takes for its storage
        self.rebuild: Callable[[Path, str, int], bytes] | None = None
        self.requests: list[Request] = []
        self.tickets: dict[str, tuple[str, bytes]] = {}
        self.lock = threading.Lock()
        self._hub = _server(self, _HubHandler)
        self._storage = _server(self, _StorageHandler)
        self.closing = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._storage.server_port}"

    def repository(self, name: str) -> Repository:
        return self.repositories.setdefault(name, Repository())

    def downloads(self, name: str) -> list[Request]:
        """Return the requests whose answers carried, or should have carried, a file's bytes."""
        return [r for r in self.requests if r.name == name and r.status in {0, 200, 206}]

    def calls(self, method: str, part: str) -> list[Request]:
        """Return the requests of a method whose path has a part."""
        return [r for r in self.requests if r.method == method and part in r.path]

    def sent(self, name: str) -> int:
        return sum(request.body_bytes for request in self.downloads(name))

    def close(self) -> None:
        if not self.closing.is_set():
            self.closing.set()
            for server in (self._hub, self._storage):
                server.shutdown()
                server.server_close()

    def __enter__(self) -> Self:
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    fake: FakeHub


def _server(fake: FakeHub, handler: type[_Handler]) -> _Server:
    server = _Server(("127.0.0.1", 0), handler)
    server.fake = fake
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server
    role = ""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:  # noqa: N802
        self.do_GET()

    def do_POST(self) -> None:  # noqa: N802
        self.do_GET()

    def do_PUT(self) -> None:  # noqa: N802
        self.do_GET()

    def body(self) -> bytes:
        """Return what the request carries; an upload may be cut."""
        length = int(self.request_record.headers.get("content-length", "0"))
        faults = self.faults
        if self.command == "PUT" and faults.cut_puts:
            length = min(length, faults.cut_puts.pop(0))
            self.rfile.read(length)
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        data = bytearray()
        while len(data) < length and (chunk := self.rfile.read(min(_CHUNK, length - len(data)))):
            data += chunk
            self.request_record.body_bytes += len(chunk)
            time.sleep(faults.seconds_per_chunk)
        return bytes(data)

    def send_json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def do_GET(self) -> None:  # noqa: N802
        self.fake, self.faults = self.server.fake, self.server.fake.faults
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.request_record = Request(self.role, self.command, self.path, headers)
        self.fake.requests.append(self.request_record)
        if (left := self.faults.requests_left) is not None:
            self.faults.requests_left = max(left - 1, 0)
            if left == 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
        try:
            self.answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self) -> None:
        raise NotImplementedError

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.request_record.status = status
        self.send_response(status)
        headers.setdefault("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error_code(self, status: int) -> None:
        extra = {"Retry_After": self.faults.retry_after} if self.faults.retry_after else {}
        self.send(status, b"", **extra)

    def send_file(self, name: str, data: bytes, **headers: str) -> None:
        """Send a file or the range of it that was asked for, and let the faults loose."""
        faults, record = self.faults, self.request_record
        record.name = name
        if name in faults.wrong_bytes:
            data = bytes(len(data) - 1) + b"\xff"
        if name in faults.flipped:
            data = data[:-1] + bytes([data[-1] ^ 1])
        data += bytes(faults.extra_bytes)
        start, status, stop = record.start, 200, record.stop
        if (start or stop) and not faults.ignore_range:
            if start >= len(data):
                self.send(416, Content_Range=f"bytes */{len(data)}")
                return
            status = 206
            if faults.wrong_ranges and start + 1 < len(data):
                faults.wrong_ranges -= 1
                start += 1
            stop = min(stop or len(data), len(data))
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data = data[start:stop]
        record.status = status
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(data)

    def _send_body(self, data: bytes) -> None:
        with self.fake.lock:
            cut = self.faults.cut_after.pop(0) if self.faults.cut_after else None
            stall = self.faults.stall_after.pop(0) if self.faults.stall_after else None
        for offset in range(self.faults.trickle):
            self.wfile.write(data[offset : offset + 1])
            time.sleep(0.05)
        data = data[self.faults.trickle :]
        end = min(x for x in (cut, stall, len(data)) if x is not None)
        for offset in range(0, end, _CHUNK):
            chunk = data[offset : min(offset + _CHUNK, end)]
            self.wfile.write(chunk)
            self.request_record.body_bytes += len(chunk)
            time.sleep(self.faults.seconds_per_chunk)
        if stall is not None:
            self.fake.closing.wait(20)
        if end < len(data):
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


class _HubHandler(_Handler):
    role = "hub"

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        authorization = self.request_record.headers.get("authorization")
        if authorization and authorization.removeprefix("Bearer ") not in self.fake.tokens:
            message = "Invalid credentials in Authorization header"
            self.send(401, X_Error_Message=message)
        elif self.command == "POST":
            self._write(path, authorization)
        elif self.fake.xet and "/xet-write-token/" in path:
            self._xet_token(self.fake.xet)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", path):
            self._api(match[1], "revision", "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path):
            self._api(*match.groups())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(*match.groups())
        else:
            self.send(404)

    def _api(self, repo: str, kind: str, revision: str) -> None:
        if self.faults.api_errors:
            self.send_error_code(self.faults.api_errors.pop(0))
            return
        found = self._find(repo, revision)
        if found is None:
            return
        sha, files = found
        document = (
            [_tree_entry(name, data) for name, data in files.items()]
            if kind == "tree"
            else {
                "id": repo,
                "sha": sha,
                "private": self.fake.repositories[repo].private,
                "gated": "auto" if self.faults.gated else False,
                "siblings": [self._sibling(name, data) for name, data in files.items()],
            }
        )
        body = json.dumps(document).encode()
        self.send(200, body, Content_Type="application/json")

    def _write(self, path: str, authorization: str | None) -> None:
        body = self.body()
        token = (authorization or "").removeprefix("Bearer ")
        if path == "/api/validate-yaml":
            bad = [{"message": "license is odd"}] if self.faults.bad_metadata else []
            self.send_json({"errors": bad, "warnings": []}, 400 if bad else 200)
        elif path.startswith("/lfs/"):  # the client sends no token to these
            self._finish(path.removeprefix("/lfs/"), json.loads(body))
        elif not authorization:
            self.send(401, X_Error_Message="Invalid username or password.")
        elif token in self.fake.read_only:
            self.send(403, X_Error_Message="your token is read-only")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path
        ):
            {"preupload": self._preupload, "commit": self._commit, "branch": self._branch}[
                match[2]
            ](match[1], match[3], body)
        else:
            self.send(404)

    def _xet_token(self, folder: Path) -> None:
        url, expiration = f"local://{folder}", int(time.time()) + 3600
        self.send_json(
            {"casUrl": url, "exp": expiration, "accessToken": "xet-token"},
            X_Xet_Cas_Url=url,
            X_Xet_Token_Expiration=str(expiration),
            X_Xet_Access_Token="xet-token",
        )

    def _create(self, wanted: Mapping[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        known = name in self.fake.repositories
        if not known:
            repository = self.fake.repository(name)
            repository.private = wanted.get("visibility") == "private"
            repository.commit({".gitattributes": b"*.gguf filter=lfs\n"})
        self.send_json({"url": f"{self.fake.endpoint}/{name}"}, 409 if known else 200)

    def _branch(self, repo: str, branch: str, body: bytes) -> None:
        repository = self.fake.repositories[repo]
        repository.refs.setdefault(branch, repository.refs["main"])
        self.send_json({})

    def _preupload(self, repo: str, branch: str, body: bytes) -> None:
        found = self._find(repo, branch)
        if found is None:
            return
        files = found[1]
        answers = [
            {
                "path": (name := wanted["path"]),
                "uploadMode": "lfs" if name.endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": etag(name, files[name]) if name in files else None,
            }
            for wanted in json.loads(body)["files"]
        ]
        self.send_json({"files": answers})

    def _batch(self, wanted: Mapping[str, Any]) -> None:
        self.send_json(
            {"transfer": "basic", "objects": [self._object(x) for x in wanted["objects"]]}
        )

    def _object(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid in self.fake.stored:
            return answer
        place = f"{self.fake.storage}/up/{oid}"
        upload: dict[str, Any] = {"href": f"{place}?sig=s3cret", "header": {}}
        if step := self.faults.part_size:
            parts = range(1, -(-size // step) + 1)
            upload = {
                "href": f"{self.fake.endpoint}/lfs/complete/{oid}",
                "header": {"chunk_size": str(step)}
                | {f"{n:05}": f"{place}/{n}?sig=s3cret" for n in parts},
            }
        verify = {"href": f"{self.fake.endpoint}/lfs/verify/{oid}"}
        return answer | {"actions": {"upload": upload, "verify": verify}}

    def _finish(self, path: str, wanted: Mapping[str, Any]) -> None:
        kind, _, oid = path.partition("/")
        if kind == "complete":
            parts = self.fake.parts.get(oid, {})
            data = b"".join(parts[entry["partNumber"]] for entry in wanted["parts"])
            if sha256(data) == oid:
                self.fake.stored[oid] = data
        self.send(200 if oid in self.fake.stored else 400)

    def _commit(self, repo: str, branch: str, body: bytes) -> None:
        repository, faults = self.fake.repositories[repo], self.faults
        lines = [json.loads(line) for line in body.splitlines()]
        if faults.commit_errors:
            self.send(faults.commit_errors.pop(0))
            return
        files = dict(repository.commits[repository.refs[branch]])
        if faults.other_commits:
            faults.other_commits -= 1
            repository.commit({**files, "other.txt": b"other"}, ref=branch)
        parent = lines[0]["value"].get("parentCommit")
        if parent and parent != repository.refs[branch]:
            self.send(412, X_Error_Message="A commit has happened since")
            return
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "deletedFile":
                del files[value["path"]]
                continue
            if line["key"] == "lfsFile" and self.fake.xet and self.fake.rebuild:
                data = self.fake.rebuild(self.fake.xet, value["oid"], value["size"])
                if sha256(data) == value["oid"]:
                    self.fake.stored[value["oid"]] = data
            if line["key"] == "lfsFile" and value["oid"] not in self.fake.stored:
                self.send(400, X_Error_Message="LFS pointer points to nothing")
                return
            files[value["path"]] = (
                self.fake.stored[value["oid"]]
                if line["key"] == "lfsFile"
                else base64.b64decode(value["content"])
            )
            if faults.wrong_commits:
                faults.wrong_commits -= 1
                files[value["path"]] = b"other bytes"
        sha = repository.commit(files, ref=branch)
        if faults.lost_answers:
            faults.lost_answers -= 1
            self.connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        self.send_json({"commitOid": sha, "commitUrl": f"{self.fake.endpoint}/{repo}/commit/{sha}"})

    def _sibling(self, name: str, data: bytes) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name}
        if "blobs" in parse_qs(urlsplit(self.path).query):
            size = self.faults.sizes.get(name, len(data))
            entry |= {"size": size, "blobId": etag("", data)}
            if name.endswith(LFS):
                entry["lfs"] = {"sha256": sha256(data), "size": size, "pointerSize": 134}
        return entry

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.fake.repositories.get(repo)
        if repository is None:
            # The real Hub says 401 to who is not logged in: the repository may be private.
            self.send(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return None
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            self.send(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
            return None
        return sha, repository.commits[sha]

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        sha, files = found
        if self.faults.gated:
            status = 403 if "authorization" in self.request_record.headers else 401
            message = f"Access to model {repo} is restricted"
            self.send(status, X_Error_Code="GatedRepo", X_Error_Message=message)
        elif name not in files or name in self.faults.gone:
            self.send(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        elif self.faults.hub_errors:
            self.send(self.faults.hub_errors.pop(0))
        else:
            self._send_or_redirect(name, files[name], sha)

    def _send_or_redirect(self, name: str, data: bytes, sha: str) -> None:
        announced = self.faults.etags.get(name, etag(name, data))
        if not name.endswith(LFS):
            self.send_file(name, data, ETag=f'"{announced}"', X_Repo_Commit=sha)
            return
        ticket = secrets.token_hex(8)
        with self.fake.lock:
            self.fake.tickets[ticket] = (name, data)
        location = self.faults.redirect_to or f"{self.fake.storage}/{sha256(data)}?sig={ticket}"
        self.send(
            302,
            Location=location,
            X_Repo_Commit=sha,
            X_Linked_Etag=f'"{announced}"',
            X_Linked_Size=str(len(data)),
            ETag='"of-the-redirect"',
        )


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(data),
        "oid": etag("", data),
    }
    if name.endswith(LFS):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


class _StorageHandler(_Handler):
    role = "storage"

    def answer(self) -> None:
        url = urlsplit(self.path)
        if self.command == "PUT":
            self._store(url.path)
            return
        ticket = parse_qs(url.query).get("sig", [""])[0]
        with self.fake.lock:
            name, data = self.fake.tickets.pop(ticket, ("", b""))
        if "authorization" in self.request_record.headers:
            self.send(400)  # as S3 does with two kinds of credentials
        elif not name:
            self.send(403)
        elif self.faults.storage_errors:
            self.send_error_code(self.faults.storage_errors.pop(0))
        else:
            self.send_file(name, data, ETag='"of-the-storage"')

    def _store(self, path: str) -> None:
        data = self.body()
        _, _, oid, *number = path.split("/")
        if "authorization" in self.request_record.headers:
            self.send(400)
        elif self.faults.put_errors:
            self.send(self.faults.put_errors.pop(0))
        elif number:
            self.fake.parts.setdefault(oid, {})[int(number[0])] = data
            self.send(200, ETag=f'"{sha256(data)[:32]}"')
        elif sha256(data) == oid:
            self.fake.stored[oid] = data
            self.send(200, ETag='"whole"')
        else:
            self.send(400)
