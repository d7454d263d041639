"""`ollama pull` as far as success depends on it: server/download.go's requests, with httpx."""

from __future__ import annotations

import hashlib
from urllib.parse import urljoin, urlsplit

import httpx

DOCKER = "application/vnd.docker.distribution.manifest.v2+json"


def pull(base: str, repository: str, tag: str) -> dict[str, bytes]:
    """Return digest -> bytes, or fail as Ollama does."""
    with httpx.Client(trust_env=False) as client:
        answer = client.get(f"{base}/v2/{repository}/manifests/{tag}", headers={"Accept": DOCKER})
        answer.raise_for_status()
        manifest = answer.json()
        entries = [*manifest["layers"], manifest["config"]]
        return {entry["digest"]: _blob(client, base, repository, entry) for entry in entries}


def _blob(client: httpx.Client, base: str, repository: str, entry: dict[str, str]) -> bytes:
    url = f"{base}/v2/{repository}/blobs/{entry['digest']}"
    size = int(client.head(url).headers["Content-Length"])
    with client.stream("GET", url) as answer:
        while (
            answer.is_redirect
            and urlsplit(urljoin(url, answer.headers["Location"])).hostname
            == urlsplit(url).hostname
        ):
            url = urljoin(url, answer.headers["Location"])
            answer = client.send(client.build_request("GET", url), stream=True)
        assert answer.status_code in (200, 307), answer.status_code
        if "Location" not in answer.headers:
            raise LookupError("http: no Location header in response")
        direct = urljoin(url, answer.headers["Location"])
        answer.close()
    data = client.get(direct, headers={"Range": f"bytes=0-{size - 1}"}).content
    assert f"sha256:{hashlib.sha256(data).hexdigest()}" == entry["digest"]
    return data
