"""Modelfiles: weights, a prompt template, a system text, parameters and licence, as one text.

A text goes through as it is or is refused (rules.py), so that Ollama's parser gives it back
unharmed. Knows nothing of GGUF.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from medllm_pack.errors import ModelfileError, shown
from medllm_pack.ollama.rules import ParameterValue, parameter_problems, text_problems


@dataclass(frozen=True)
class Modelfile:
    """What ``ollama create`` makes a model of.

    Attributes:
        from_: the weights beside the Modelfile, such as ``./model.gguf``.
        template: prompt template in Go's syntax.
        system: system text; empty for none.
        parameters: names from :data:`PARAMETERS`; ``stop`` takes a list of texts.
        license: licence texts.
    """

    from_: str
    template: str
    system: str = ""
    parameters: Mapping[str, ParameterValue] | None = None
    license: Sequence[str] = ()


def render(modelfile: Modelfile, *, name: str = "NAME", file: str = "Modelfile") -> str:
    """Return the text of a Modelfile; the same value always gives the same text.

    Args:
        modelfile: what to write.
        name: model name in the header comment.
        file: file name in the header comment.

    Raises:
        ModelfileError: naming each text that Ollama would not read back as it is.
    """
    if problems := [*_modelfile_problems(modelfile), *_line_problems("header", name + file)]:
        raise ModelfileError("; ".join(problems))
    lines = [
        "# In the folder of this file:",
        f"#   ollama create {name} -f {file}",
        f"#   ollama run {name}",
        f"FROM {modelfile.from_}",
        *_parameter_lines(modelfile.parameters or {}),
        f"TEMPLATE {_quoted(modelfile.template)}",
        *([f"SYSTEM {_quoted(modelfile.system)}"] if modelfile.system else []),
        *(f"LICENSE {_quoted(text)}" for text in modelfile.license),
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # Always three quotes: with one, a quote before a line break would end the text.
    return f'"""{text}"""'


def _parameter_lines(parameters: Mapping[str, ParameterValue]) -> Iterator[str]:
    for name, value in sorted(parameters.items()):
        match value:
            case bool():
                yield f"PARAMETER {name} {str(value).lower()}"
            case int() | float():
                yield f"PARAMETER {name} {value!r}"
            case _:
                yield from (f"PARAMETER {name} {_quoted(text)}" for text in value)


def _modelfile_problems(modelfile: Modelfile) -> Iterator[str]:
    yield from _from_problems(modelfile.from_)
    yield from parameter_problems(modelfile.parameters or {})
    yield from text_problems("TEMPLATE", modelfile.template)
    if not modelfile.template:
        yield "TEMPLATE is empty; Ollama would guess one, so write at least '{{ .Prompt }}'"
    yield from text_problems("SYSTEM", modelfile.system)
    for number, text in enumerate(modelfile.license, 1):
        yield from text_problems(f"LICENSE {number}", text)


def _from_problems(from_: str) -> Iterator[str]:
    # One name in the folder of the Modelfile; Ollama trims white space behind it.
    if not re.fullmatch(r"\./[^/\\]+", from_) or from_ == "./.." or from_ != from_.rstrip():
        yield f"FROM {shown(from_)} is not a file beside the Modelfile; write it as './FILE.gguf'"
    yield from _line_problems("FROM", from_)


def _line_problems(label: str, text: str) -> Iterator[str]:
    if "\n" in text:
        yield f"{label}: {shown(text)} has more than one line; write it on one"
    yield from text_problems(label, text)
