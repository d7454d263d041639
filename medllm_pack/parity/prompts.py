"""Rung *template*: what Ollama makes of a variant's Modelfile, as the model gets to read it.

The Modelfile that lies in the pack is read, rendered for a few chats, and cut into ids by llama.cpp
with control tokens recognised, as Ollama does it. One BOS, the ids that the tokenizer alone gives,
an end where the model goes on, and stops that can occur. The chats are fixed; no text of a user is
needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medllm_pack.errors import ModelfileError, SourceError, WorkerError, shown
from medllm_pack.files import read_small
from medllm_pack.ollama.modelfile import Modelfile
from medllm_pack.ollama.reading import read_modelfile
from medllm_pack.ollama.rules import stop_problems
from medllm_pack.ollama.style import template_sha256
from medllm_pack.ollama.template import Message, Template
from medllm_pack.parity.checks import Check, broken, skipped
from medllm_pack.parity.texts import shipped_texts
from medllm_pack.parity.tokens import Tokenizer

FIRST = "Homem, 58 anos, hipertenso. Dor torácica em aperto há 2 horas. PA 150/90 mmHg."
ANSWER = "Paciente hipertenso, com dor torácica em aperto há 2 horas."
SECOND = "ECG sem supradesnivelamento de ST."
_OPENING = 60  # characters of a note that a stop must not stand in

# Texts and stops to ids and spellings: the job "prompts" of a worker.
Ask = Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]]


def read_beside(folder: Path, entry: Mapping[str, Any]) -> Modelfile:
    """Return the Modelfile of a variant, which must name the variant's file.

    Raises:
        SourceError: if it cannot be read.
        ModelfileError: if it is not of the form that medllm-pack writes, or names other weights.
    """
    name = str(entry["modelfile"])
    if Path(name).name != name:
        raise SourceError(f"pack.json names the Modelfile {shown(name)}, which is not in the pack")
    try:
        text = read_small(folder / name, limit=4 << 20).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelfileError(f"{name} is not UTF-8; build the pack again") from error
    modelfile = read_modelfile(text)
    if modelfile.from_ != f"./{entry['file']}":
        raise ModelfileError(f"{name} is FROM {shown(modelfile.from_)}, not {entry['file']}")
    return modelfile


def check_template(
    folder: Path, entry: Mapping[str, Any], digest: str, tokenizer: Tokenizer, ask: Ask
) -> list[Check]:
    """Return the checks of the rung for one variant.

    Args:
        folder: the pack.
        entry: of the variant in pack.json.
        digest: SHA-256 of the template, as pack.json says.
        tokenizer: the original's.
        ask: lets llama.cpp tokenize.
    """
    try:
        modelfile = read_beside(folder, entry)
        template = Template.parse(modelfile.template, label=str(entry["modelfile"]))
    except (SourceError, ModelfileError) as error:
        return [broken("template.modelfile", str(error))]
    prompts = [template.render(*chat) for chat in _chats(modelfile.system)]
    whole = [prompt + _answer(prompt) for prompt in prompts]
    stops = _stops(modelfile)
    try:
        answer = ask([*prompts, *whole], stops)
    except WorkerError as error:
        return [broken("template.tokens", str(error))]
    ids, longer = answer["ids"][: len(prompts)], answer["ids"][len(prompts) :]
    return [
        _check_bos(ids, tokenizer),
        _check_ids(prompts, ids, tokenizer),
        _check_end(prompts, ids, longer, tokenizer),
        _check_stops(template, prompts, stops, answer["spelled"], tokenizer),
        _check_digest(modelfile, digest),
    ]


def _chats(system: str) -> Iterator[list[Message]]:
    """Yield the ways a model is asked; a prompt of /api/generate is a user's message."""
    begin: list[Message] = [("system", system)] if system else []
    yield [("user", FIRST)]
    yield [*begin, ("user", FIRST)]
    yield [*begin, ("user", FIRST), ("assistant", ANSWER), ("user", SECOND)]


def _answer(prompt: str) -> str:
    """Return an answer as a model would begin it: a word, after a blank if none stands there."""
    return ANSWER if prompt[-1:].isspace() else f" {ANSWER}"


def _stops(modelfile: Modelfile) -> list[str]:
    stops = (modelfile.parameters or {}).get("stop", ())
    return [str(stop) for stop in stops]  # type: ignore[union-attr]


def _check_bos(ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Check:
    bos, wanted = tokenizer.bos, int(tokenizer.adds_bos)
    counts = [list(found).count(bos) for found in ids]
    worst = max(counts, key=lambda n: abs(n - wanted))
    first = all(list(found[:wanted]) == [bos] * wanted for found in ids)
    where = "each" if set(counts) == {worst} else "one"
    detail = f"{worst} BOS in {where} of {len(ids)} prompts"
    return Check("template.bos", worst, f"= {wanted}", worst == wanted and first, detail)


def _check_ids(prompts: Sequence[str], ids: Sequence[Sequence[int]], tokenizer: Tokenizer) -> Check:
    if not tokenizer.comparable:
        return skipped("template.ids", "SentencePiece alone cannot follow this tokenizer")
    wrong = [
        p for p, i in zip(prompts, ids, strict=True) if list(i) != tokenizer.encode(p, special=True)
    ]
    detail = f"{len(prompts)} prompts are cut as the tokenizer cuts them"
    if wrong:
        detail = f"{len(wrong)} of {len(prompts)} prompts are cut otherwise, such as {_end(wrong)}"
    return Check("template.ids", len(wrong), "= 0 differ", not wrong, detail)


def _end(prompts: Sequence[str]) -> str:
    return f"the one that ends in {shown(prompts[0][-40:])}"


def _check_end(
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    longer: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
) -> Check:
    """Compare the ids of a prompt with the beginning of prompt and answer in one.

    A blank at the end belongs to the word that follows, whether this vocabulary has it or not.
    """
    wrong = sum(
        prompt.endswith((" ", "\t")) or list(a) != list(b[: len(a)])
        for prompt, a, b in zip(prompts, ids, longer, strict=True)
    )
    detail = "the prompt ends where the model goes on"
    if wrong:
        detail = (
            f"{wrong} prompts do not end where an answer begins: with the answer behind it the end "
            "is cut into other tokens; end the template before .Response with a line break"
        )
    if tokenizer.adds_eos:
        detail = (
            "the tokenizer puts an EOS behind every prompt; set add_eos_token to false in "
            "tokenizer_config.json, and build again"
        )
    return Check("template.end", wrong, "= 0 prompts", not wrong, detail)


def _check_stops(
    template: Template,
    prompts: Sequence[str],
    stops: Sequence[str],
    spelled: Sequence[str],
    tokenizer: Tokenizer,
) -> Check:
    wrong = list(stop_problems(stops))
    for stop, spelling in zip(stops, spelled, strict=True):
        wrong += _stop_problem(stop, spelling, prompts, tokenizer)
    wrong += _frame_problem(template, [*stops, tokenizer.text(tokenizer.eos)])
    return Check(
        "template.stops", len(wrong), "= 0 of no use", not wrong,
        "; ".join(wrong) or f"{len(stops)} stops can occur, and end no answer at once",
    )  # fmt: skip


def _stop_problem(
    stop: str, spelling: str, prompts: Sequence[str], tokenizer: Tokenizer
) -> Iterator[str]:
    texts = [*tokenizer.controls(), *sorted(tokenizer.special)]
    control = [token for token in texts if token in stop]
    if control:
        yield f"stop {shown(stop)}: {control[0]} is a control token and is never written as text"
    elif stop not in spelling:
        yield f"stop {shown(stop)} can never occur: the model would spell it {shown(spelling)}"
    elif stop and any(prompt.endswith(stop) for prompt in prompts):
        yield f"stop {shown(stop)} stands at the end of the prompt, where the answer begins"
    elif stop and _is_common(stop):
        yield f"stop {shown(stop)} stands near the beginning of most notes and would end them there"


def _is_common(stop: str) -> bool:
    notes = shipped_texts(count=16).notes
    return 2 * sum(stop in note[:_OPENING] for note in notes) > len(notes)


def _frame_problem(template: Template, ends: Sequence[str]) -> Iterator[str]:
    """Say so if a model that goes on with the template's next heading meets no stop or EOS."""
    chat: list[Message] = [("user", FIRST), ("assistant", ANSWER), ("user", SECOND)]
    after = template.render(*chat).rpartition(ANSWER)[2]
    frame = after.partition(SECOND)[0]
    if frame.strip() and not any(end and end in frame for end in ends):
        yield (
            f"no stop stands in {shown(frame.strip())}, with which a model goes on after its answer"
        )


def _check_digest(modelfile: Modelfile, digest: str) -> Check:
    same = template_sha256(modelfile.template) == digest
    detail = "the template is the one that pack.json names" if same else (
        "the template is not the one that pack.json names"
    )  # fmt: skip
    return Check("template.digest", int(not same), "= 0 differ", same, detail)
