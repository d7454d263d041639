"""Modelfiles: styles read from a folder, and text that Ollama's parser gives back unharmed.

A style is a prompt template, a system text and sampling parameters; a :class:`Modelfile` adds the
weights and the licence. Ollama's parser drops what it cannot print and ends a text at three quotes
before a line break, both silently. Here a text goes through as it is or is refused, with place and
remedy. Knows nothing of GGUF; the rules come from ollama parser/parser.go and api/types.go.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medllm_pack import resources
from medllm_pack.errors import ModelfileError, RecipeError, SourceError, UsageError, shown
from medllm_pack.files import read_small
from medllm_pack.ollama.template import problems as template_problems
from medllm_pack.tables import problems_of

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

_FOLDER = "Modelfiles"
_TEXT_LIMIT = 1 << 20  # bytes of a style's file; the context is 4096 tokens

# Ollama turns these into control tokens; the one BOS comes from tokenizer.ggml.add_bos_token.
_CONTROL_TOKENS: Final = ("<s>", "</s>", "<unk>")

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


@dataclass(frozen=True)
class Style:
    """A way of asking the model: template, system text, parameters and stops.

    Attributes:
        name: short name, such as ``nota-clinica``.
        title: name for people, in Portuguese.
        description: one sentence, in Portuguese.
        template: prompt template in Go's syntax.
        system: system text; empty for none.
        parameters: sampling parameters without the stops.
        stop: texts that end the answer.
    """

    name: str
    title: str
    description: str
    template: str
    system: str
    parameters: Mapping[str, ParameterValue]
    stop: tuple[str, ...]

    @classmethod
    def load(cls, source: str | Path) -> Style:
        """Read a style: a shipped name, or a folder (a Path, or text with a slash).

        Raises:
            UsageError: if there is no such style.
            RecipeError: with every problem of the style's files.
        """
        folder = _style_folder(source)
        problems: list[str] = []
        template = _read_text(folder / "template.gotmpl", problems=problems)
        system = ""
        if (folder / "system.txt").exists():
            system = _read_text(folder / "system.txt", problems=problems).removesuffix("\n")
        table = _read_table(folder / "style.toml", problems=problems)
        problems += _style_problems(template, system=system)
        if problems or table is None:
            raise RecipeError(str(source), problems)
        return cls(
            name=table.name,
            title=table.title,
            description=table.description,
            template=template,
            system=system,
            parameters=table.parameters,
            stop=tuple(table.stop),
        )

    @property
    def template_sha256(self) -> str:
        """SHA-256 of the template's UTF-8 bytes, as 64 lower-case hex digits."""
        return template_sha256(self.template)

    def modelfile(
        self,
        from_: str,
        *,
        parameters: Mapping[str, ParameterValue] | None = None,
        license: Sequence[str] = (),
    ) -> Modelfile:
        """Return the Modelfile of this style; ``parameters`` replace the style's one by one."""
        own: dict[str, ParameterValue] = {**self.parameters, "stop": self.stop}
        return Modelfile(
            from_=from_,
            template=self.template,
            system=self.system,
            parameters=own | dict(parameters or {}),
            license=tuple(license),
        )


def template_sha256(template: str) -> str:
    """Return the SHA-256 of a template's UTF-8 bytes, as 64 lower-case hex digits."""
    return hashlib.sha256(template.encode()).hexdigest()


def style_names() -> tuple[str, ...]:
    """Return the names of the shipped styles."""
    return tuple(
        sorted(path.parent.name for path in resources.folder(_FOLDER).glob("*/style.toml"))
    )


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


# What is wrong with a Modelfile, one sentence each.


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


def text_problems(label: str, text: str) -> Iterator[str]:
    """Yield what Ollama would not read back of a text; ``label`` names it."""
    if (at := text.find('"""')) >= 0:
        yield (
            f"{_place(label, text, at)}: three quotes would end the text for Ollama, and what "
            "follows could become commands; use other quotes"
        )
    refused = [at for at, char in enumerate(text) if not survives(char)]
    if refused:
        more = f" (and {len(refused) - 1} more such characters)" if len(refused) > 1 else ""
        yield f"{_place(label, text, refused[0])}: {_refusal(text[refused[0]])}{more}"


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


def _place(label: str, text: str, at: int) -> str:
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


# What is wrong with a style, one sentence each.


def _style_problems(template: str, *, system: str) -> Iterator[str]:
    for label, text in (("template.gotmpl", template), ("system.txt", system)):
        yield from text_problems(label, text)
        for token in _CONTROL_TOKENS:
            if (at := text.find(token)) >= 0:
                yield (
                    f"{_place(label, text, at)}: {token!r} would become a control token; leave it "
                    "out, the tokenizer adds the one that begins a text"
                )
    if template:
        yield from template_problems(template, label="template.gotmpl")


# Reading a style's folder.


class _StyleTable(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", description="short name, as in a path")
    title: str = Field(min_length=1, description="name for people")
    description: str = Field(min_length=1, description="what the style is for, one sentence")
    stop: list[str] = Field(description="texts that end the answer; may be empty")
    parameters: dict[str, Any] = Field(description="Ollama parameters, such as num_ctx")


def _style_folder(source: str | Path) -> Path:
    if isinstance(source, str) and source in style_names():
        return resources.folder(_FOLDER) / source
    if isinstance(source, str) and "/" not in source:
        raise UsageError(_unknown_style(source))
    folder = Path(source).expanduser()
    if not (folder / "style.toml").is_file():
        raise UsageError(
            f"the folder {shown(source)} holds no style.toml; it is what makes a style"
        )
    return folder


def _unknown_style(name: str) -> str:
    known = style_names()
    near = get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"there is no style {shown(name)}.{hint} Shipped: {', '.join(known)}; "
        f"a folder of your own is named by its path, such as ./{shown(name)[1:-1]}"
    )


def _read_text(path: Path, *, problems: list[str]) -> str:
    """Return a file's text; on failure add to the problems and return an empty text."""
    try:
        # Bytes, not text mode: a CR must be seen to be refused.
        text = read_small(path, limit=_TEXT_LIMIT).decode("utf-8")
    except UnicodeDecodeError as error:
        problems.append(f"{path.name} is not UTF-8 at byte {error.start}; save it as UTF-8")
    except SourceError as error:
        problems.append(str(error))
    else:
        if not text.strip():
            problems.append(f"{path.name} is empty; write the text or delete the file")
        return text
    return ""


def _read_table(path: Path, *, problems: list[str]) -> _StyleTable | None:
    text = _read_text(path, problems=problems)
    if not text:
        return None
    try:
        table = _StyleTable.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{path.name} is not valid TOML: {error}")
    except ValidationError as error:
        problems += problems_of(error, _StyleTable)
    else:
        problems += parameter_problems({**table.parameters, "stop": table.stop})
        if "stop" in table.parameters:
            problems.append("parameters.stop: stops stand beside the table; write stop = [...]")
        return table
    return None
