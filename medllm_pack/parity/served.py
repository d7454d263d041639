"""Rung *served*: what an Ollama server writes, against what llama.cpp writes from the same file.

Asked for by name only (``--ollama MODEL``), and always with the synthetic notes: a server may log
what it is asked, and may stand elsewhere. Greedily on both sides, once with the prompt as it is and
once through the template. Where the two part at a near tie, that is the arithmetic's noise. How
many tokens the server read is compared with what the original's tokenizer gives.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medllm_pack.errors import ServerError, WorkerError, shown
from medllm_pack.limits import Limits
from medllm_pack.ollama.modelfile import Modelfile
from medllm_pack.ollama.server import Generated, Server
from medllm_pack.ollama.template import Message, Template
from medllm_pack.parity.checks import Check, at_least, broken, skipped
from medllm_pack.parity.texts import shipped_texts
from medllm_pack.parity.tokens import Tokenizer

# Openings of notes. Many short ones: of a coarse variant, even another model's text often parts at
# a near tie, which says nothing, but hardly in every note.
_PROMPTS, _CHARACTERS, _TOKENS = 16, 60, 12
_FROM = re.compile(r"^FROM \S*sha256[-:]([0-9a-f]{64})\s*$", re.MULTILINE)
# What the Modelfile sets for people is taken back: greedy, no penalty, no stop.
_OPTIONS: Mapping[str, Any] = {
    "temperature": 0.0, "top_k": 1, "seed": 1, "repeat_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "stop": [],
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

    def generate(self, prompt: str, *, raw: bool, context: int, tokens: int) -> Generated:
        """Return what it writes greedily."""
        options = {**_OPTIONS, "num_ctx": context, "num_predict": tokens}
        return self.server.generate(self.model, prompt, raw=raw, options=options)

    def __str__(self) -> str:
        return f"{shown(self.model)} at {self.server.address}"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What came of asking in one way.

    Attributes:
        name: of the check that compares the texts.
        prompts: as the server was given them.
        read: as the model gets to read them.
        ours: what llama.cpp writes.
        theirs: what the server writes; one a prompt, unless something went wrong.
        error: what that was.
    """

    name: str
    prompts: Sequence[str]
    read: Sequence[str]
    ours: Mapping[str, Any]
    theirs: Sequence[Generated]
    error: str = ""

    @property
    def raw(self) -> bool:
        return self.name == "served.raw"


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
    served: Served,
    quant: str,
    modelfile: Modelfile,
    tokenizer: Tokenizer,
    write: Write,
    limits: Limits,
) -> list[Check]:
    """Return the checks of the rung for the variant that is served."""
    notes = [opening(note) for note in shipped_texts(count=_PROMPTS).notes]
    template = Template.parse(modelfile.template)
    begin: list[Message] = [("system", modelfile.system)] if modelfile.system else []
    rendered = [template.render(*begin, ("user", note)) for note in notes]
    asked = [
        _ask("served.raw", served, notes, notes, write),
        _ask("served.template", served, notes, rendered, write),
    ]
    texts = [_compare(one, served, quant, limits) for one in asked]
    return [_check_tokens(asked, served, tokenizer), *texts]


def opening(note: str) -> str:
    """Return the first words of a note."""
    return note[:_CHARACTERS].rpartition(" ")[0]


def _ask(
    name: str, served: Served, prompts: Sequence[str], read: Sequence[str], write: Write
) -> _Asked:
    ours: Mapping[str, Any] = {}
    try:
        ours = write(read, _TOKENS)
        theirs = [
            served.generate(
                prompt, raw=name == "served.raw", context=ours["context"], tokens=_TOKENS
            )
            for prompt in prompts
        ]
    except (WorkerError, ServerError) as error:
        return _Asked(name, prompts, read, ours, (), str(error))
    return _Asked(name, prompts, read, ours, theirs)


def _check_tokens(asked: Sequence[_Asked], served: Served, tokenizer: Tokenizer) -> Check:
    """Compare how many tokens the server read with the tokenizer's: a BOS too many is one more."""
    name = "served.tokens"
    if not tokenizer.comparable:
        return skipped(name, "SentencePiece alone cannot follow this tokenizer")
    told = [answer.read for one in asked for answer in one.theirs]
    given = [len(tokenizer.encode(prompt, special=True)) for one in asked for prompt in one.read]
    if len(told) < len(given):
        return skipped(name, "the server was not asked everything")
    pairs = [(there, here) for there, here in zip(told, given, strict=True) if there is not None]
    more = any(there > here for there, here in pairs)
    if not more and (len(pairs) < len(given) or _counts_in_part(asked[-1], served, pairs)):
        return skipped(name, "the server does not say how many tokens it reads in all")
    detail = "; ".join(_differences(pairs)) or (
        f"of {len(pairs)} prompts the server reads as many tokens as the tokenizer gives"
    )
    wrong = sum(there != here for there, here in pairs)
    return Check(name, wrong, "= 0 prompts", wrong == 0, detail)


def _counts_in_part(asked: _Asked, served: Served, pairs: Sequence[tuple[int, int]]) -> bool:
    """Say whether the server counts only what it had not kept of the prompt before.

    Where a prompt seems to be too short, it is asked for twice.
    """
    if all(there >= here for there, here in pairs):
        return False
    try:
        again = served.generate(
            asked.prompts[-1], raw=asked.raw, context=asked.ours["context"], tokens=1
        )
    except ServerError:
        return False
    return again.read is None or again.read < pairs[-1][0]


def _differences(pairs: Sequence[tuple[int, int]]) -> Iterator[str]:
    apart = [(there, here) for there, here in pairs if there != here]
    if apart:
        there, here = apart[0]
        yield (
            f"of {len(pairs)} prompts {len(apart)} have another number of tokens than the "
            f"tokenizer gives: {there} instead of {here}"
        )
    steps = {there - here for there, here in apart}
    if steps == {1}:
        yield "one more each time, as with a BOS twice"
    if steps == {-1}:
        yield "one less each time, as without a BOS"


def _compare(asked: _Asked, served: Served, quant: str, limits: Limits) -> Check:
    if asked.error:
        return broken(asked.name, asked.error)
    counted = [
        compare_texts(answer.text, written["texts"], written["margins"], limits.served_tie)
        for answer, written in zip(asked.theirs, asked.ours["written"], strict=True)
    ]
    alike, lost = (sum(numbers) for numbers in zip(*counted, strict=True))
    detail = (
        f"{alike} tokens that llama.cpp writes from {quant}, {served} writes too, {lost} it does "
        "not"
    )
    share = alike / (alike + lost) if alike + lost else 1.0
    return at_least(asked.name, share, limits.served_agreement, detail)


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
    parting = find_parting(text, ours, margins)
    if parting is None:
        return len(ours), 0
    at, lead = parting
    return at, 0 if lead < tie else len(ours) - at


def find_parting(
    text: str, ours: Sequence[str], margins: Sequence[float]
) -> tuple[int, float] | None:
    """Return which of our tokens the server did not write, and by how much it led; None if all."""
    for i, part in enumerate(ours):
        if not text.startswith(part.rstrip("\ufffd")):  # half a character is not there yet
            first = i - 1 if _is_blank(ours, i - 1) else i
            return first, min(margins[first : i + 1])
    return None


def _is_blank(ours: Sequence[str], i: int) -> bool:
    """Say whether a token is a blank alone.

    Words begin with a blank, too: who chose one instead has parted there, and it shows one later.
    """
    if i < 0:
        return False
    before = ours[i - 1] if i else ""
    return ours[i].removeprefix(before).isspace()
