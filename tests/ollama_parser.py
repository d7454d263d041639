"""A second reader of Modelfiles: Ollama's state machine, written from parser/parser.go.

Shares nothing with the package. It knows what Ollama does with a text, not what is wise: it drops
what Go does not print and takes three quotes before a line break for the end of a text.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from enum import Enum, auto

COMMANDS = {
    "from",
    "license",
    "template",
    "system",
    "adapter",
    "draft",
    "renderer",
    "parser",
    "parameter",
    "message",
    "requires",
}


class ParseError(Exception):
    """Ollama would not read this Modelfile."""


@dataclass(frozen=True)
class Command:
    """One command; ``FROM`` is called ``model`` as in Ollama, a parameter by its own name."""

    name: str
    args: str


class State(Enum):
    NIL = auto()
    NAME = auto()
    VALUE = auto()
    PARAMETER = auto()
    MESSAGE = auto()
    COMMENT = auto()


def parse(text: str) -> list[Command]:
    return _Parser().run(text)


class _Parser:
    def __init__(self) -> None:
        self.state = State.NIL
        self.buffer = ""
        self.name = ""
        self.role = ""
        self.commands: list[Command] = []

    def run(self, text: str) -> list[Command]:
        for char in text.removeprefix("\ufeff"):
            self.feed(char)
        if self.state is State.VALUE:
            value = unquote(self.buffer.strip())
            if value is None:
                raise ParseError("unexpected end")
            self.finish(value)
        elif self.state not in (State.NIL, State.COMMENT):
            raise ParseError("unexpected end")
        if not any(command.name == "model" for command in self.commands):
            raise ParseError("no FROM line")
        return self.commands

    def feed(self, char: str) -> None:
        following, kept = step(self.state, char)
        if following is not self.state:
            if self.state is State.VALUE:
                value = unquote(self.buffer.strip())
                if value is None or kept in (" ", "\t"):
                    self.buffer += kept
                    return
                self.finish(value)
            elif self.state is State.NAME:
                following = self.after_name(following)
            elif self.state is State.PARAMETER:
                self.name = self.buffer
            elif self.state is State.MESSAGE:
                if self.buffer not in ("system", "user", "assistant"):
                    raise ParseError("message role")
                self.role = self.buffer
            self.buffer = ""
            self.state = following
        if is_print(kept):
            self.buffer += kept

    def after_name(self, following: State) -> State:
        word = self.buffer.lower()
        if word not in COMMANDS:
            raise ParseError(f"command {word!r}")
        if word == "parameter":
            return State.PARAMETER
        self.name = "model" if word == "from" else word
        return State.MESSAGE if word == "message" else following

    def finish(self, value: str) -> None:
        self.commands.append(Command(self.name, f"{self.role}: {value}" if self.role else value))
        self.role = ""


def step(state: State, char: str) -> tuple[State, str]:
    """Return the next state and the character that is kept, if any."""
    space, newline = char in (" ", "\t"), char in ("\r", "\n")
    alpha = char.isascii() and char.isalpha()
    match state:
        case State.NIL:
            if char == "#":
                return State.COMMENT, ""
            return (State.NIL, "") if space or newline else (State.NAME, char)
        case State.COMMENT:
            return (State.NIL if newline else State.COMMENT), ""
        case State.VALUE:
            return (State.NIL if space or newline else State.VALUE), char
        case State.NAME | State.MESSAGE | State.PARAMETER:
            more = state is State.PARAMETER and char.isascii() and (char.isdigit() or char == "_")
            if alpha or more:
                return state, char
            if space:
                return State.VALUE, ""
            raise ParseError(f"{char!r} in {state.name.lower()}")


def unquote(text: str) -> str | None:
    """Return the text without its quotes; None while the closing ones are missing."""
    for quotes in ('"""', '"'):
        if text.startswith(quotes):
            whole = len(text) >= 2 * len(quotes) and text.endswith(quotes)
            return text[len(quotes) : -len(quotes)] if whole else None
    return text


def is_print(char: str) -> bool:
    """Go's strconv.IsPrint: letters, marks, numbers, punctuation, symbols and ASCII space."""
    return char != "" and (char == " " or unicodedata.category(char)[0] in "LMNPS")
