"""Styles: a prompt template, a system text and sampling parameters, read from a folder.

Shipped under a name, or a user's own. Every problem of a style's files is found at once.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from medllm_pack import resources
from medllm_pack.errors import RecipeError, SourceError, UsageError, shown
from medllm_pack.files import read_small
from medllm_pack.home import expanded
from medllm_pack.ollama.modelfile import Modelfile
from medllm_pack.ollama.rules import ParameterValue, parameter_problems, place_of, text_problems
from medllm_pack.ollama.template import problems as template_problems
from medllm_pack.tables import problems_of

_FOLDER = "Modelfiles"
_TEXT_LIMIT = 1 << 20  # bytes of a style's file; the context is 4096 tokens

# Ollama turns these into control tokens; the one BOS comes from tokenizer.ggml.add_bos_token.
_CONTROL_TOKENS: Final = ("<s>", "</s>", "<unk>")


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


def _style_problems(template: str, *, system: str) -> Iterator[str]:
    for label, text in (("template.gotmpl", template), ("system.txt", system)):
        yield from text_problems(label, text)
        for token in _CONTROL_TOKENS:
            if (at := text.find(token)) >= 0:
                yield (
                    f"{place_of(label, text, at)}: {token!r} would become a control token; leave "
                    "it out, the tokenizer adds the one that begins a text"
                )
    if template:
        yield from template_problems(template, label="template.gotmpl")


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
    folder = expanded(source)
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
