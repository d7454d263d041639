"""The door to Ollama's API, against a loopback server: addresses, answers, and what goes wrong."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from medllm_pack.errors import ServerError, UsageError
from medllm_pack.ollama.server import Address, Generated, Server

Answer = tuple[int, bytes]
Answers = Callable[[str, Any], Answer]
Serve = Callable[[Answers], Server]


class _Handler(BaseHTTPRequestHandler):
    answers: Answers

    def do_GET(self) -> None:  # noqa: N802, the name that http.server calls
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        status, data = type(self).answers(self.path, json.loads(body) if body else None)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class _Http(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print what goes wrong, but for a client that hung up: the tests make it do so."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Return a function that starts a server on a free port of this machine."""
    running: list[ThreadingHTTPServer] = []

    def start(answers: Answers) -> Server:
        handler = type("Handler", (_Handler,), {"answers": staticmethod(answers)})
        server = _Http(("127.0.0.1", 0), handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return Server(Address("http", "127.0.0.1", server.server_address[1]), timeout=5)

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("10.0.0.7", "http://10.0.0.7:11434"),
        (":5000", "http://127.0.0.1:5000"),
        ("example.org:80", "http://example.org:80"),
        ("http://example.org", "http://example.org:80"),
        ("https://example.org", "https://example.org:443"),
        ("https://example.org:8443/ollama/", "https://example.org:8443/ollama"),
        ("[::1]", "http://[::1]:11434"),
        ("[::1]:7", "http://[::1]:7"),
        (' "localhost" ', "http://localhost:11434"),
    ],
)
def test_address_is_read_as_ollamas_client_reads_it(text: str, address: str) -> None:
    assert str(Address.parse(text)) == address
    assert Address.parse(address) == Address.parse(text)


@pytest.mark.parametrize(
    "text", ["ftp://a", "a:b", "a:99999", "http://me:pw@a", "http://[::1", "a?b"]
)
def test_what_is_no_address_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(UsageError, match="http://127.0.0.1:11434"):
        Address.parse(text)


def test_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "example.org:5")
    assert str(Server.from_environment().address) == "http://example.org:5"


def test_calls_are_those_of_the_documented_api(serve: Serve) -> None:
    asked: list[tuple[str, Any]] = []

    def answer(path: str, question: Any) -> Answer:
        asked.append((path, question))
        return (
            200,
            b'{"version": "0.12.0", "response": "sim", "modelfile": "FROM x",'
            b'"prompt_eval_count": 7}',
        )

    server = serve(answer)
    assert server.version() == "0.12.0"
    assert server.show("m:1")["modelfile"] == "FROM x"
    assert server.generate("m:1", "olá", raw=True, options={"seed": 1}) == Generated("sim", 7)
    assert asked == [
        ("/api/version", None),
        ("/api/show", {"model": "m:1"}),
        ("/api/generate", {
            "model": "m:1", "prompt": "olá", "raw": True, "stream": False, "options": {"seed": 1},
        }),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((404, b'{"error": "model \\u001b[31m not found"}'), r"404: 'model \\x1b\[31m not found'"),
        ((500, b"oops"), "500: 'without a reason'"),
        ((302, b"{}"), "302"),
        ((200, b"<html>"), "no JSON object"),
        ((200, b"[]"), "no JSON object"),
        ((200, b'{"response": 7}'), "no text 'response'"),
        ((200, b"[" * 100_000), "no JSON object"),
        ((200, b" " * (17 << 20)), "more than 16777216 bytes"),
    ],
)
def test_other_answers_are_one_line_with_the_fact(serve: Serve, answer: Answer, said: str) -> None:
    server = serve(lambda *_: answer)
    with pytest.raises(ServerError, match=said) as error:
        server.generate("m", "p", raw=True, options={})
    assert "\n" not in str(error.value)


def test_server_that_is_not_there_says_what_to_do() -> None:
    with pytest.raises(ServerError, match=r"127\.0\.0\.1:1 .*ollama serve.*OLLAMA_HOST"):
        Server(Address("http", "127.0.0.1", 1)).version()


def test_server_that_never_answers_is_given_up(serve: Serve) -> None:
    forever = threading.Event()

    def answer(*_: Any) -> Answer:
        forever.wait(5)
        return 200, b"{}"

    with pytest.raises(ServerError, match="timed out"):
        serve(answer).version(timeout=0.2)
    forever.set()
