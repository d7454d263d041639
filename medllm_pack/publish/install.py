"""Into the Ollama of this machine or of another: the store where it can be reached, else the API.

A server is asked for a few random bytes that were just put into a store: only the server whose
store it is has them. So the store of a service, of another user or in a container is told apart
from one that lies around. Without a server the first store that exists is taken, or the user's is
made.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medllm_pack.errors import ServerError, StoreAccessError, WriteError, shown
from medllm_pack.known import Known
from medllm_pack.ollama import create
from medllm_pack.ollama.image import Blob
from medllm_pack.ollama.names import ModelName
from medllm_pack.ollama.placing import place
from medllm_pack.ollama.server import Server
from medllm_pack.ollama.store import Store, candidates, full_name
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.publish import read
from medllm_pack.publish.release import Tagged

_HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::")


@dataclass(frozen=True)
class Installed:
    """A model that Ollama now has.

    Attributes:
        name: as it was asked for.
        quant: the variant.
        digest: of the manifest.
        where: the store's folder or the server's address.
        way: how it got there.
        changed: False if it was there already.
        copied: bytes that were copied or sent.
    """

    name: str
    quant: str
    digest: str
    where: str
    way: Literal["store", "api"]
    changed: bool
    copied: int

    def document(self) -> dict[str, Any]:
        """Return what --json shows."""
        return dict(vars(self))


def install(
    wanted: Sequence[tuple[Tagged, ModelName]],
    *,
    store: Path | None = None,
    server: Server | None = None,
    replace: bool = False,
    report: Reporter = SILENT,
) -> list[Installed]:
    """Install variants under names.

    Args:
        wanted: variants and their names.
        store: the store to use, whatever a server says; found if None.
        server: the server that may be running; that of the environment if None.
        replace: whether a name that means another model may be replaced.
        report: listener.

    Raises:
        WriteError: if a name is taken, or nothing can be written.
        ServerError: if the server refuses.
    """
    server = server or Server.from_environment(timeout=600)
    place_ = Store(store) if store else _find(server)
    if isinstance(place_, Server):
        return [_send(place_, *one, replace=replace, report=report) for one in wanted]
    return [_put(place_, *one, replace=replace, report=report) for one in wanted]


def _find(server: Server) -> Store | Server:
    """Return the store that the running server uses, or the server; without one, a store."""
    existing = [Store(path) for path in candidates() if path.is_dir()]
    if _runs(server):
        return next((store for store in existing if _is_of(store, server)), server)
    return existing[0] if existing else Store(candidates()[0])


def _runs(server: Server) -> bool:
    try:
        server.version(timeout=1)
    except ServerError:
        if server.address.host not in _HERE:
            raise  # who names another machine does not mean this one's store
        return False
    return True


def _is_of(store: Store, server: Server) -> bool:
    """Say whether a server sees what is put into a store."""
    probe = Blob.of(secrets.token_bytes(32), "")
    path = store.blob(probe.digest)
    try:
        store.check_access()
        if not path.parent.is_dir():
            return False
        place(probe, path)
        return server.has_blob(probe.digest)
    except (StoreAccessError, OSError):
        return False
    finally:
        _remove(path)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a store that may not be written to has nothing to remove


def _put(
    store: Store, tagged: Tagged, name: ModelName, *, replace: bool, report: Reporter
) -> Installed:
    weights = read.weights_of(tagged.image).source
    with Known().linking(weights) if isinstance(weights, Path) else nullcontext():
        done = store.install(tagged.image, name, replace=replace, report=report)
    return Installed(
        str(name), tagged.quant, str(tagged.image.digest), str(store.root), "store",
        done.changed, done.copied,
    )  # fmt: skip


def _send(
    server: Server, tagged: Tagged, name: ModelName, *, replace: bool, report: Reporter
) -> Installed:
    """Install through the API: weights are sent unless they are there, the rest is asked for."""
    weights = read.weights_of(tagged.image)
    old = _named(server, name)
    if old is not None and old != tagged.image.digest.hex and not replace:
        raise WriteError(
            f"{name} exists on {server.address}; --force replaces it, --name takes another name"
        )
    sent = 0
    if not server.has_blob(weights.digest):
        report.step(f"sending to {server.address}", total_bytes=weights.size)
        server.send_blob(weights, advance=report.advance)
        sent = weights.size
    if old != tagged.image.digest.hex:
        server.create(str(name), _question(tagged, weights))
    return Installed(
        str(name), tagged.quant, _digest(server, name), str(server.address), "api",
        old != tagged.image.digest.hex, sent,
    )  # fmt: skip


def _question(tagged: Tagged, weights: Blob) -> dict[str, Any]:
    """Return the body of /api/create that makes the layers of an image."""
    file = read.from_of(tagged.image) or "model.gguf"
    question: dict[str, Any] = {"files": {file: str(weights.digest)}}
    licenses = []
    for layer in tagged.image.layers:
        match layer.media_type:
            case create.TEMPLATE:
                question["template"] = read.small(layer).decode()
            case create.SYSTEM:
                question["system"] = read.small(layer).decode()
            case create.LICENSE:
                licenses.append(read.small(layer).decode())
            case create.PARAMS:
                question["parameters"] = json.loads(read.small(layer))
            case create.MESSAGES:
                question["messages"] = json.loads(read.small(layer))
    return question | ({"license": licenses} if licenses else {})


def _named(server: Server, name: ModelName) -> str | None:
    """Return the digest of a model on a server, in hex, or None if there is no such model."""
    wanted = str(full_name(name)).lower()
    for listed, digest in server.models().items():
        if str(full_name(ModelName.parse(listed))).lower() == wanted:
            return digest.removeprefix("sha256:")
    return None


def _digest(server: Server, name: ModelName) -> str:
    digest = _named(server, name)
    if digest is None:
        raise ServerError(
            f"{server.address} does not list {shown(name)} after creating it; look at its log"
        )
    return f"sha256:{digest}"
