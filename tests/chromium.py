"""A headless Chromium, driven over its debugging pipe: no port, no driver, no library."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    # Nothing resolves: what a page asked for would fail, and be seen below all the same.
    "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
_ENTRIES = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


class Browser:
    """One page; remembers every event."""

    def __init__(self, program: str, profile: Path) -> None:
        """Start it; descriptors 3 and 4 are its ends of the pipe."""
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        plumbing = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", plumbing, "chromium", program, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable")

    def open(self, path: Path) -> None:
        """Load a file and wait until it is complete."""
        self.events.clear()
        self._call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page; the debugger is not under its policy."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def color_scheme(self, scheme: str) -> None:
        """Prefer light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self._call("Emulation.setEmulatedMedia", features=[feature])

    def media(self, kind: str) -> None:
        """Show the page as for print; "" as it is."""
        self._call("Emulation.setEmulatedMedia", media=kind)

    def width(self, pixels: int) -> None:
        """Take the width of another screen."""
        self._call("Emulation.setDeviceMetricsOverride", width=pixels, height=800,
                   deviceScaleFactor=1, mobile=pixels < 600)  # fmt: skip

    def print(self) -> bytes:
        """Return the page as PDF, on the paper that it asks for."""
        self._call("Emulation.clearDeviceMetricsOverride")
        answer = self._call("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(answer["data"])

    def screenshot(self) -> bytes:
        """Return the whole page as PNG."""
        answer = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    def requests(self) -> list[str]:
        """Return the address of every request since the page was opened."""
        sent = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[dict[str, Any]]:
        """Return everything that was said on the console, policy violations included."""
        return [event for event in self.events if event["method"] in _ENTRIES]

    def close(self) -> None:
        """End it."""
        os.close(self._to)
        self._process.kill()
        self._process.wait()
        os.close(self._from)

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._from, 1 << 16)
            assert data, "chromium ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message
