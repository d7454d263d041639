"""How tests let the Hub's client library speak, and a reporter that keeps what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from medllm_pack.patience import Patience

QUICK = Patience(tries=3, first_wait_s=0.0, longest_wait_s=0.0, stall_s=10.0)


@dataclass
class Recorded:
    """A reporter that keeps what it is told."""

    steps: list[tuple[str, int | None]] = field(default_factory=list)
    n_bytes: list[int] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def step(self, name: str, *, total_bytes: int | None = None) -> None:
        self.steps.append((name, total_bytes))

    def advance(self, n_bytes: int) -> None:
        self.n_bytes.append(n_bytes)

    def notice(self, text: str) -> None:
        self.notices.append(text)


def let_speak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client library speak, without the user's token."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
