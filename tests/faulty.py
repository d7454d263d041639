"""Servers that misbehave, on the loopback: one that holds a blob, one in front of a registry."""

from __future__ import annotations

import http.client
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Request:
    """A request whose body was not read yet."""

    method: str
    path: str
    headers: dict[str, str]
    connection: socket.socket = field(repr=False)
    file: Any = field(repr=False)

    def body(self) -> bytes:
        data: bytes = self.file.read(int(self.headers.get("content-length", "0")))
        return data

    def send(self, status: str, body: bytes = b"", **headers: str) -> None:
        """Answer; a Content-Length among the headers replaces the right one."""
        fields = {"Content-Length": str(len(body))}
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.connection.sendall(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body)

    def trickle(self, data: bytes, *, pause_s: float = 0.05) -> None:
        """Send a byte at a time until the other side has gone."""
        for n in range(len(data)):
            self.connection.sendall(data[n : n + 1])
            time.sleep(pause_s)


Script = Callable[[Request], None]


class _Handler(socketserver.StreamRequestHandler):
    script: Script

    def handle(self) -> None:
        # Whether TLS is spoken here is asked first.
        encrypted = isinstance(self.connection, ssl.SSLSocket)
        if not encrypted and self.connection.recv(1, socket.MSG_PEEK) == b"\x16":
            return
        while line := self.rfile.readline():
            method, path, _ = line.decode().split(" ")
            headers = {}
            while (field := self.rfile.readline().strip().decode()) != "":
                name, _, value = field.partition(":")
                headers[name.lower()] = value.strip()
            request = Request(method, path, headers, self.connection, self.rfile)
            try:
                type(self).script(request)
            except (ConnectionError, TimeoutError):
                return

    def finish(self) -> None:
        try:
            super().finish()
        except ConnectionError:
            return


@contextmanager
def serving(script: Script, *, tls: tuple[Path, Path] | None = None) -> Iterator[str]:
    """Yield the ``host:port`` of a server that does with every request what a script says.

    A script that raises ConnectionError ends the connection. Certificate and key make it speak TLS.
    """
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
    handler = type("Handler", (_Handler,), {"script": staticmethod(script)})

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = allow_reuse_address = True

        def finish_request(self, request: Any, client_address: Any) -> None:
            if not context:
                super().finish_request(request, client_address)
                return
            with context.wrap_socket(request, server_side=True) as encrypted:
                super().finish_request(encrypted, client_address)

        def handle_error(self, *_: object) -> None:
            """A client that hung up is no news."""

    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def cut() -> None:
    """End the connection."""
    raise ConnectionError


def silence(request: Request) -> None:
    """Say nothing until the other side hangs up."""
    while request.connection.recv(1 << 16):
        pass
    cut()


def forward(request: Request, host: str) -> None:
    """Let another server answer; its addresses name it, and are left as they are."""
    there = http.client.HTTPConnection(host, timeout=10)
    try:
        headers = {**request.headers, "host": request.headers["host"]}
        there.request(request.method, request.path, request.body(), headers)
        answer = there.getresponse()
        told = dict(answer.getheaders())
        body = answer.read()
    finally:
        there.close()
    if request.method != "HEAD":
        told["Content-Length"] = str(len(body))
    told.pop("Transfer-Encoding", None)
    request.send(f"{answer.status} {answer.reason}", body, **told)
