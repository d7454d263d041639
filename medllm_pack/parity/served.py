"""Rung *served*: what an Ollama server writes, against what llama.cpp writes from the same file.

Asked for by name only (``--ollama MODEL``), and always with the synthetic notes: a server may log
what it is asked, and may stand elsewhere. Greedily on both sides, once with the prompt as it is and
once through the template. Where the two part at a near tie, that is the arithmetic's noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medllm_pack.errors import ServerError, WorkerError, shown
from medllm_pack.limits import Limits
from medllm_pack.ollama.modelfile import Modelfile
from medllm_pack.ollama.server import Server
from medllm_pack.ollama.template import Message, Template
from medllm_pack.parity.checks import Check, at_least, broken
from medllm_pack.parity.texts import shipped_texts

_PROMPTS, _CHARACTERS, _TOKENS = 4, 60, 24  # a few openings of notes
_FROM = re.compile(r"^FROM \S*sha256[-:]([0-9a-f]{64})\s*$", re.MULTILINE)
# What the Modelfile sets for people is taken back: greedy, no penalty, no stop.
_OPTIONS: Mapping[str, Any] = {
    "temperature": 0.0, "top_k": 1, "seed": 1, "num_predict": _TOKENS, "repeat_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": [],
}  # fmt: skip

# Prompts to what llama.cpp writes after each: the job "write" of a worker.
Write = Callable[[Sequence[str], int], Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Served:
    """A model on a server.

    Attributes:
        model: its name there.
        sha256: digest of its weights, by which the variant of the pack is found.
    """

    server: Server
    model: str
    sha256: str


def find_served(server: Server, model: str, digests: Mapping[str, str]) -> Served:
    """Return the model on the server, which must hold the weights of a variant.

    Args:
        server: where it is.
        model: its name.
        digests: variant -> SHA-256 of its file.

    Raises:
        ServerError: if it is not there, or holds other weights.
    """
    server.version()  # with little patience, to see if there is anyone
    found = _FROM.search(str(server.show(model).get("modelfile", "")))
    if found is None:
        raise ServerError(f"the server at {server.address} does not say what {shown(model)} holds")
    if found[1] not in digests.values():
        raise ServerError(
            f"{shown(model)} at {server.address} holds the weights sha256:{found[1][:12]}…, which "
            f"are none of this pack's; run ollama create {model} -f Modelfile.{min(digests)}"
        )
    return Served(server, model, found[1])


def check_served(
    served: Served, quant: str, modelfile: Modelfile, write: Write, limits: Limits
) -> list[Check]:
    """Return the checks of the rung for the variant that is served."""
    notes = [opening(note) for note in shipped_texts(count=_PROMPTS).notes]
    template = Template.parse(modelfile.template)
    begin: list[Message] = [("system", modelfile.system)] if modelfile.system else []
    rendered = [template.render(*begin, ("user", note)) for note in notes]
    return [
        _compare("served.raw", served, quant, notes, notes, write, limits),
        _compare("served.template", served, quant, notes, rendered, write, limits),
    ]


def opening(note: str) -> str:
    """Return the first words of a note."""
    return note[:_CHARACTERS].rpartition(" ")[0]


def _compare(
    name: str,
    served: Served,
    quant: str,
    asked: Sequence[str],
    read: Sequence[str],
    write: Write,
    limits: Limits,
) -> Check:
    try:
        ours = write(read, _TOKENS)
        theirs = [
            served.server.generate(
                served.model, prompt, raw=name == "served.raw",
                options={**_OPTIONS, "num_ctx": ours["context"]},
            )
            for prompt in asked
        ]  # fmt: skip
    except (WorkerError, ServerError) as error:
        return broken(name, str(error))
    counted = [
        compare_texts(text, written["texts"], written["margins"], limits.served_tie)
        for text, written in zip(theirs, ours["written"], strict=True)
    ]
    alike, lost = (sum(numbers) for numbers in zip(*counted, strict=True))
    detail = (
        f"{alike} tokens that llama.cpp writes from {quant}, {shown(served.model)} at "
        f"{served.server.address} writes too, {lost} it does not"
    )
    share = alike / (alike + lost) if alike + lost else 1.0
    return at_least(name, share, limits.served_agreement, detail)


def compare_texts(
    text: str, ours: Sequence[str], margins: Sequence[float], tie: float
) -> tuple[int, int]:
    """Return how many tokens are alike, and how many are not; none after a parting at a near tie.

    Args:
        text: what the server wrote.
        ours: our text after each token.
        margins: by how much each of our tokens led.
        tie: margin below which another choice is as good, and nothing after it can be compared.
    """
    for i, part in enumerate(ours):
        if not text.startswith(part.rstrip("\ufffd")):  # half a character is not there yet
            return i, 0 if margins[i] < tie else len(ours) - i
    return len(ours), 0
