"""Reads the Modelfiles that this package writes; anything else is refused by its line.

Ollama's own parser takes far more and drops some of it in silence. Whoever checks a pack wants the
text that every Ollama reads in the same way, so this is the inverse of
:func:`~medllm_pack.ollama.modelfile.render` and nothing more.
"""

from __future__ import annotations

import re
from typing import Any, Final

from medllm_pack.errors import ModelfileError, shown
from medllm_pack.ollama.modelfile import Modelfile
from medllm_pack.ollama.rules import PARAMETERS, ParameterValue, parameter_problems, text_problems

_QUOTED: Final = r'"""(?P<{}>(?:(?!"""\n).)*)"""'
_COMMAND = re.compile(
    r"(?:#[^\n]*"
    r"|FROM (?P<from>[^\n]+)"
    rf"|PARAMETER stop {_QUOTED.format('stop')}"
    r"|PARAMETER (?P<name>(?!stop )[a-z0-9_]+) (?P<value>[^\s\"]+)"
    rf"|(?P<word>TEMPLATE|SYSTEM|LICENSE) {_QUOTED.format('text')})\n",
    re.DOTALL,
)


def read_modelfile(text: str) -> Modelfile:
    """Return what a Modelfile says; ``read_modelfile(render(m))`` equals ``m``.

    Stops are returned as they are, be they of use or not.

    Raises:
        ModelfileError: if the text is not of the form that ``render`` writes.
    """
    found: dict[str, list[str]] = {"FROM": [], "TEMPLATE": [], "SYSTEM": [], "LICENSE": []}
    parameters: dict[str, ParameterValue] = {}
    stops: list[str] = []
    at = 0
    while at < len(text):
        match = _COMMAND.match(text, at)
        if match is None:
            raise ModelfileError(_refusal(text, at))
        if match["from"]:
            found["FROM"].append(match["from"])
        elif match["stop"] is not None:
            stops.append(match["stop"])
        elif match["name"]:
            parameters[match["name"]] = _value(match["name"], match["value"])
        elif match["word"]:
            found[match["word"]].append(match["text"])
        at = match.end()
    if stops:
        parameters["stop"] = tuple(stops)
    return _modelfile(found, parameters)


def _modelfile(found: dict[str, list[str]], parameters: dict[str, ParameterValue]) -> Modelfile:
    texts = [("SYSTEM", t) for t in found["SYSTEM"]] + [("TEMPLATE", t) for t in found["TEMPLATE"]]
    texts += [("PARAMETER stop", str(t)) for t in parameters.get("stop", ())]  # type: ignore[union-attr]
    wrong = [problem for label, text in texts for problem in text_problems(label, text)]
    wrong += parameter_problems({n: v for n, v in parameters.items() if n != "stop"})
    for word, least in (("FROM", 1), ("TEMPLATE", 1), ("SYSTEM", 0)):
        if not least <= len(found[word]) <= 1:
            wrong.append(f"{word} stands in it {len(found[word])} times; write it once")
    if wrong:
        raise ModelfileError("; ".join(wrong))
    return Modelfile(
        from_=found["FROM"][0],
        template=found["TEMPLATE"][0],
        system="".join(found["SYSTEM"]),
        parameters=parameters,
        license=tuple(found["LICENSE"]),
    )


def _value(name: str, text: str) -> Any:
    """Return a parameter's value in its type; the text itself if it has none."""
    kind = PARAMETERS.get(name)
    if kind is bool:
        return {"true": True, "false": False}.get(text, text)
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        return text


def _refusal(text: str, at: int) -> str:
    line = text.count("\n", 0, at) + 1
    start = text[at : at + 60].partition("\n")[0]
    return (
        f"line {line} is not as medllm-pack writes it: {shown(start)}; build the pack again, or "
        "change the style instead of the Modelfile"
    )
