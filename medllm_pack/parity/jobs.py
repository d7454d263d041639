"""What llama.cpp is asked about one file: every job in a worker of its own, with its limits.

Answers are looked at before they are believed: a file may hold another vocabulary than the model,
and a worker that was led astray may answer anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medllm_pack.errors import WorkerError
from medllm_pack.parity import worker
from medllm_pack.parity.allowance import TOGETHER, Allowance, in_batches, to_compute, to_read
from medllm_pack.parity.nameless import Nameless, descriptor
from medllm_pack.parity.runtime import Runtime

Ids = Sequence[int]


@dataclass(frozen=True)
class Jobs:
    """Jobs with one GGUF file. All raise WorkerError.

    Attributes:
        file: where it is.
        config: of the model that it should hold, as transformers reads it.
        runtime: how llama.cpp is run.
        command: the worker's program; tests put another in its place.
    """

    file: Path
    config: Any
    runtime: Runtime
    command: worker.Command = worker.COMMAND

    def tokenize(self, texts: Sequence[str]) -> list[Ids]:
        """Return the ids of texts, with BOS and EOS as the file says."""
        answer = self._ask("tokenize", to_read(self.file), texts=list(texts))
        return _rows(answer, "ids", len(texts), int)

    def prompts(self, texts: Sequence[str], stops: Sequence[str]) -> Mapping[str, Any]:
        """Return ids of prompts as Ollama cuts them, and stops as the vocabulary spells them."""
        answer = self._ask("prompts", to_read(self.file), texts=list(texts), stops=list(stops))
        return {
            "ids": _rows(answer, "ids", len(texts), int),
            "spelled": _listed(answer, "spelled", len(stops), str),
        }

    def write(self, prompts: Sequence[str], tokens: int) -> Mapping[str, Any]:
        """Return the greedy continuation of texts after each token, and by how much it led."""
        lengths = [len(prompt.encode()) + 2 for prompt in prompts]  # no text has more tokens
        answer = self._compute("write", lengths, tokens=tokens, prompts=list(prompts))
        for written in _listed(answer, "written", len(prompts), dict):
            texts = _listed(written, "texts", None, str)
            _listed(written, "margins", len(texts), float)
        return answer

    def continue_(self, prompts: Sequence[Ids], tokens: int) -> list[Ids]:
        """Return the ids of the greedy continuation of prompts."""
        answer = self._compute(
            "continue", [len(ids) for ids in prompts], tokens=tokens,
            together=min(len(prompts), TOGETHER), prompts=_lists(prompts),
        )  # fmt: skip
        written = _rows(answer, "ids", len(prompts), int)
        if any(not 0 <= id_ < self._vocabulary for ids in written for id_ in ids):
            raise WorkerError("llama.cpp writes tokens that the model does not have")
        return written

    def logits(self, sequences: Sequence[Ids], place: Nameless) -> list[Path]:
        """Let the logits of each sequence be written into a file; return the files."""
        paths = [place.new() for _ in sequences]
        lengths = [len(ids) for ids in sequences]
        together = max(map(len, in_batches(lengths)))
        self._compute(
            "logits", lengths, writes=True, tokens=0, together=together,
            sequences=_lists(sequences), files=[descriptor(path) for path in paths],
        )  # fmt: skip
        for path, ids in zip(paths, sequences, strict=True):
            self._look_at(path, len(ids))
        return paths

    @property
    def _vocabulary(self) -> int:
        size: int = self.config.vocab_size
        return size

    def _look_at(self, path: Path, length: int) -> None:
        try:
            shape = np.load(path, mmap_mode="r").shape
        except (OSError, ValueError) as error:
            raise WorkerError("llama.cpp's worker wrote logits that cannot be read") from error
        if shape != (length, self._vocabulary):
            raise WorkerError(
                f"llama.cpp gives logits of {shape[-1] if shape else 0} tokens, the model has "
                f"{self._vocabulary}"
            )

    def _compute(
        self,
        job: str,
        lengths: Sequence[int],
        *,
        tokens: int,
        writes: bool = False,
        together: int = 1,
        **more: Any,
    ) -> dict[str, Any]:
        allowance = to_compute(
            self.file, self.config, lengths, tokens=tokens, threads=self.runtime.threads,
            gpu=self.runtime.gpu_layers > 0, writes=writes, together=together,
        )  # fmt: skip
        if not writes:
            more["tokens"] = tokens
        return self._ask(job, allowance, **more, **self.runtime.arguments())

    def _ask(self, job: str, allowance: Allowance, **arguments: Any) -> dict[str, Any]:
        return worker.call(
            job, allowance=allowance, command=self.command, model=str(self.file.resolve()),
            **arguments,
        )  # fmt: skip


def _lists(sequences: Sequence[Ids]) -> list[list[int]]:
    return [list(ids) for ids in sequences]


def _listed(answer: Mapping[str, Any], key: str, n: int | None, kind: type) -> list[Any]:
    """Return a list of an answer if it has the length and the type that it should have."""
    found = answer.get(key)
    if isinstance(found, list) and n in (None, len(found)):
        items: list[Any] = found
        if all(isinstance(item, kind) for item in items):
            return items
    raise WorkerError(f"llama.cpp's worker answered no {key} that fit the question")


def _rows(answer: Mapping[str, Any], key: str, n: int, kind: type) -> list[Ids]:
    rows = _listed(answer, key, n, list)
    for row in rows:
        _listed({key: row}, key, None, kind)
    return rows
