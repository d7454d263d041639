"""Prompt templates: the few actions a style may use, and what Ollama makes of them for a chat.

Ollama runs a template that does not name ``.Messages`` once a turn and cuts the last turn after
``.Response``: the prompt ends where the model goes on. Done here without Go; the tests compare with
Go's own text/template. Knows nothing of files, stops or tokens. The rules come from ollama
template/template.go and Go's text/template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from medllm_pack.errors import ModelfileError, shown

Role = Literal["system", "user", "assistant"]
Message = tuple[Role, str]

# What a template may do. Nothing here looks at what a message says, so no text can be slipped in
# for some patients only.
ACTIONS: Final = {".System", ".Prompt", ".Response", "if .System", "if .Prompt", "end"}
_ACTION = re.compile(r"\{\{(-(?=\s))?(.*?)((?<=\s)-)?\}\}", re.DOTALL)
_TRIMMED: Final = " \t\r\n"  # what Go's trim markers take away
_RESPONSE: Final = ".Response"


def problems(template: str, *, label: str) -> Iterator[str]:
    """Yield what is wrong with a template, one sentence each; ``label`` names it."""
    found = [" ".join(action.split()) for _, action, _ in _ACTION.findall(template)]
    for action in dict.fromkeys(found):
        if action not in ACTIONS:
            yield (
                f"{label}: '{{{{ {shown(action)[1:-1]} }}}}' is not one of the actions a "
                f"style may use: {', '.join(sorted(ACTIONS))}"
            )
    if "{{" in _ACTION.sub("", template):
        yield f"{label}: a '{{{{' has no '}}}}'; close it"
    yield from _structure_problems(found, label)


def _structure_problems(actions: Sequence[str], label: str) -> Iterator[str]:
    depths = _depths(actions)
    if depths is None:
        yield f"{label}: 'if' and 'end' do not match; close each 'if' with one 'end'"
        return
    if ".Prompt" not in actions:
        yield f"{label}: it has no {{{{ .Prompt }}}}; write it where the user's text goes"
    # Ollama cuts the last turn after .Response and fails if that stands inside a branch.
    if [depth for action, depth in depths if action == _RESPONSE] != [0]:
        yield (
            f"{label}: {{{{ .Response }}}} must stand in it once and outside of 'if'; "
            "write it where the answer begins"
        )


def _depths(actions: Sequence[str]) -> list[tuple[str, int]] | None:
    """Return each action with the number of open ifs around it; None if they do not match."""
    depth, depths = 0, []
    for action in actions:
        depths.append((action, depth))
        depth += action.startswith("if ") - (action == "end")
        if depth < 0:
            return None
    return depths if depth == 0 else None


@dataclass(slots=True)
class _Turn:
    """What one run of the template is given."""

    system: str = ""
    prompt: str = ""
    response: str = ""

    def value(self, name: str) -> str:
        return {".System": self.system, ".Prompt": self.prompt, _RESPONSE: self.response}[name]


@dataclass(frozen=True, slots=True)
class _Text:
    text: str


@dataclass(frozen=True, slots=True)
class _Field:
    name: str


@dataclass(frozen=True, slots=True)
class _If:
    name: str
    nodes: list[_Node] = field(default_factory=list)


_Node = _Text | _Field | _If


@dataclass(frozen=True, slots=True)
class Template:
    """A template of the allowed actions, ready to be rendered."""

    _nodes: Sequence[_Node]

    @classmethod
    def parse(cls, text: str, *, label: str = "TEMPLATE") -> Template:
        """Read a template.

        Raises:
            ModelfileError: with everything that is wrong with it.
        """
        if wrong := list(problems(text, label=label)):
            raise ModelfileError("; ".join(wrong))
        return cls(_parse(text))

    def render(self, *chat: Message) -> str:
        """Return the prompt that Ollama makes of a chat: up to where the model goes on.

        A prompt of ``/api/generate`` is a user's message, a system text goes before it.
        """
        *done, last = _turns(_joined(chat))
        cut = next(i for i, node in enumerate(self._nodes) if node == _Field(_RESPONSE))
        finished = "".join(_run(self._nodes, turn) for turn in done)
        return finished + _run(self._nodes[: cut + 1], last)


def _parse(text: str) -> Sequence[_Node]:
    root: list[_Node] = []
    stack, at, trim = [root], 0, False
    for match in _ACTION.finditer(text):
        before, action, after = match.groups()
        _add_text(stack[-1], text[at : match.start()], left=trim, right=before is not None)
        match action.split():
            case ["end"]:
                stack.pop()
            case ["if", name]:
                branch = _If(name)
                stack[-1].append(branch)
                stack.append(branch.nodes)
            case [name]:
                stack[-1].append(_Field(name))
        at, trim = match.end(), after is not None
    _add_text(root, text[at:], left=trim, right=False)
    return root


def _add_text(nodes: list[_Node], text: str, *, left: bool, right: bool) -> None:
    text = text.lstrip(_TRIMMED) if left else text
    text = text.rstrip(_TRIMMED) if right else text
    if text:
        nodes.append(_Text(text))


def _run(nodes: Sequence[_Node], turn: _Turn) -> str:
    parts = []
    for node in nodes:
        match node:
            case _Text(text):
                parts.append(text)
            case _Field(name):
                parts.append(turn.value(name))
            case _If(name, inner) if turn.value(name):
                parts.append(_run(inner, turn))
    return "".join(parts)


def _joined(chat: Sequence[Message]) -> list[Message]:
    """Merge neighbours of one role."""
    merged: list[Message] = []
    for role, content in chat:
        if merged and merged[-1][0] == role:
            merged[-1] = (role, f"{merged[-1][1]}\n\n{content}")
        else:
            merged.append((role, content))
    return merged


def _turns(chat: Sequence[Message]) -> list[_Turn]:
    """Deal messages out to turns; the last is the open one."""
    turns = [_Turn()]
    for role, content in chat:
        turn = turns[-1]
        full = turn.response or (role == "system" and turn.prompt)
        if role != "assistant" and full:
            turn = _Turn()
            turns.append(turn)
        match role:
            case "system":
                turn.system = content
            case "user":
                turn.prompt = content
            case "assistant":
                turn.response = content
    return turns
