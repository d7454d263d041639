"""Pushes a release in forks that kill themselves at the N-th request, before or after its answer.

Run as a process of its own by test_push_faults.py: ``push_worker.py PLAN``, a JSON file. Prints the
number of requests of an undisturbed push, and one line a kill.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import httpx

from medllm_pack.publish.push import Options, push
from medllm_pack.publish.targets import RegistryTarget
from medllm_pack.publish.transport import Access
from tests.registries import QUICK, release


class Counting(httpx.BaseTransport):
    """Kills this process at a request; ``at`` counts in halves: before it, after its answer."""

    def __init__(self, inner: httpx.BaseTransport, at: int) -> None:
        self.inner, self.at, self.n = inner, at, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self._step()
        answer = self.inner.handle_request(request)
        self._step()
        return answer

    def _step(self) -> None:
        if self.n == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.n += 1

    def close(self) -> None:
        self.inner.close()


def main(plan: Path) -> None:
    words = json.loads(plan.read_text())
    sent = release(Path(words["folder"]), size=words["size"])
    for at in words["at"]:
        child = os.fork()
        if child == 0:
            made: list[Counting] = []

            def wrap(
                inner: httpx.BaseTransport, at: int = at, made: list[Counting] = made
            ) -> httpx.BaseTransport:
                made.append(Counting(inner, at))
                return made[-1]

            target = RegistryTarget("oci", words["host"], words["repository"].format(at))
            options = Options(state=Path(words["state"]), chunk=words["chunk"], ask_ollama=False)
            push(sent, target, access=Access(patience=QUICK, transport=wrap), options=options)
            print(json.dumps({"steps": made[0].n}), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps({"at": at, "signal": os.WTERMSIG(status)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
