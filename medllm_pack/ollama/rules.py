"""What a text or a parameter in a Modelfile may be, so that Ollama gives it back unharmed.

Ollama's parser drops what it cannot print and ends a text at three quotes before a line break, both
silently. Here every fault is a sentence with place and remedy. The rules come from ollama
parser/parser.go and api/types.go.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Final

from medllm_pack.errors import shown

ParameterValue = bool | int | float | Sequence[str]

# api.Options in ollama api/types.go. Missing on purpose: typical_p, mirostat*, tfs_z,
# penalize_newline, numa and others that newer versions ignore or refuse.
PARAMETERS: Final[Mapping[str, type]] = {
    "frequency_penalty": float,
    "main_gpu": int,
    "min_p": float,
    "num_batch": int,
    "num_ctx": int,
    "num_gpu": int,
    "num_keep": int,
    "num_predict": int,
    "num_thread": int,
    "presence_penalty": float,
    "repeat_last_n": int,
    "repeat_penalty": float,
    "seed": int,
    "stop": list,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "use_mmap": bool,
}
_MEANING: Final = {
    bool: "true or false",
    float: "a number",
    int: "a whole number of at most 31 bits",
    list: "a list of texts",
}
_FLOAT32_MAX = 3.4028234663852886e38  # Ollama reads numbers with strconv.ParseFloat(…, 32)

# Younger than Unicode 3.2 and still known everywhere: capital sharp s, pictographs, stethoscope.
_LATER: Final = frozenset(map(chr, (0x1E9E, *range(0x1F300, 0x1F650), 0x1FA7A)))
_CONTROL_NAMES: Final = {
    "\0": "NULL",
    "\x0b": "LINE TABULATION",
    "\x0c": "FORM FEED",
    "\r": "CARRIAGE RETURN",
    "\x1b": "ESCAPE",
    "\x7f": "DELETE",
    "\x85": "NEXT LINE",
}
_DROPPED = "is dropped by Ollama"
# By character, else by category: the fact and the next step.
_REFUSED: Final = {
    "\r": ("changes with editor and system", "save the text with LF line ends"),
    "\x85": (_DROPPED, "break the line with LF"),
    "Zs": (_DROPPED, "write an ordinary space"),
    "Zl": (_DROPPED, "break the line with LF"),
    "Zp": (_DROPPED, "break the line with LF"),
    "Cs": ("is half a character and has no UTF-8", "write the whole character"),
    "Cc": (_DROPPED, "delete it"),
    "Cf": (_DROPPED, "delete it"),
    "Co": (_DROPPED, "write it another way"),
}
_UNKNOWN = (
    "is not known to every Ollama, which drops what it does not know",
    "write it another way",
)


def text_problems(label: str, text: str) -> Iterator[str]:
    """Yield what Ollama would not read back of a text; ``label`` names it."""
    if (at := text.find('"""')) >= 0:
        yield (
            f"{place_of(label, text, at)}: three quotes would end the text for Ollama, and what "
            "follows could become commands; use other quotes"
        )
    refused = [at for at, char in enumerate(text) if not survives(char)]
    if refused:
        more = f" (and {len(refused) - 1} more such characters)" if len(refused) > 1 else ""
        yield f"{place_of(label, text, refused[0])}: {_refusal(text[refused[0]])}{more}"


def survives(char: str) -> bool:
    """Return whether a character passes every Ollama: printable for Go, a tab or a line feed."""
    # Python's and Go's Unicode differ in age. What Unicode 3.2 had, every build of both knows;
    # Python carries its 3.2 tables unchanged, so the answer is the same everywhere.
    return char in "\n\t " or (
        unicodedata.category(char)[0] in "LMNPS"
        and (unicodedata.ucd_3_2_0.category(char) != "Cn" or char in _LATER)
    )


def _refusal(char: str) -> str:
    name = unicodedata.name(char, _CONTROL_NAMES.get(char, "without a name"))
    fact, remedy = _REFUSED.get(char) or _REFUSED.get(unicodedata.category(char), _UNKNOWN)
    return f"U+{ord(char):04X} ({name}) {fact}; {remedy}"


def place_of(label: str, text: str, at: int) -> str:
    """Return line and column of a place in a text, for a message."""
    line = text.count("\n", 0, at) + 1
    column = at - text.rfind("\n", 0, at)
    return f"{label}, line {line}, column {column}"


def parameter_problems(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with parameters, their stops included."""
    for name, value in sorted(parameters.items()):
        if name not in PARAMETERS:
            yield _unknown_parameter(name)
        elif not _has_type(value, PARAMETERS[name]):
            yield f"parameter {name}: {shown(value)} is not {_MEANING[PARAMETERS[name]]}"
        elif name == "stop":
            yield from stop_problems(value)


def _unknown_parameter(name: str) -> str:
    near = get_close_matches(name, PARAMETERS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"Ollama has {', '.join(PARAMETERS)}"
    return f"there is no parameter {shown(name)}; {hint}"


def _has_type(value: object, kind: type) -> bool:
    match value:
        case bool():
            return kind is bool
        case int():
            return kind in (int, float) and abs(value) < 1 << 31
        case float():
            return kind is float and abs(value) <= _FLOAT32_MAX  # refuses nan and inf, too
        case list() | tuple():
            return kind is list and all(isinstance(item, str) for item in value)
        case _:
            return False


def stop_problems(stops: Sequence[str]) -> Iterator[str]:
    """Yield the stops that are empty, unreadable or hidden behind another."""
    for number, stop in enumerate(stops):
        yield from text_problems("PARAMETER stop", stop)
        if not stop:
            yield "PARAMETER stop: an empty text would end every answer at once; leave it out"
        for other_number, other in enumerate(stops):
            if other and other in stop and (other != stop or other_number < number):
                yield (
                    f"PARAMETER stop: {shown(stop)} can never act, because {shown(other)} ends the "
                    "answer before it; leave one out"
                )
