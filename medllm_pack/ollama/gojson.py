"""JSON as Go's encoder writes it: what Ollama stores is digested, so every byte counts.

``json.NewEncoder(w).Encode(v)`` of Go's encoding/json: no spaces, the keys of a map sorted and
those of a struct in its order, ``<``, ``>``, ``&`` and two line separators escaped, a line feed at
the end. Knows nothing of what is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

import numpy as np

Value = str | bool | int | float | Sequence["Value"] | Mapping[str, "Value"]

# encoding/json encode.go, appendString with escapeHTML; what json.dumps escapes otherwise.
_ESCAPED = re.compile("[<>&\u2028\u2029]")
_SMALLEST, _LARGEST = 1e-6, 1e21  # beyond, floats are written with an exponent


def encode(value: Value) -> bytes:
    """Return the bytes of a value; the keys of a mapping are written in its own order."""
    return (_text(value) + "\n").encode()


def sorted_map(values: Mapping[str, Value]) -> dict[str, Value]:
    """Return a mapping in the order in which Go writes a map."""
    return dict(sorted(values.items(), key=lambda item: item[0].encode()))


def float32(text: str) -> float:
    """Return the number that Go's float32 of ``text`` becomes once it has been through JSON.

    Ollama's client reads a parameter with 32 bits and sends its shortest text; its server reads
    that with 64 bits.
    """
    return float(str(np.float32(text)))


def _text(value: Value) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _ESCAPED.sub(_escape, json.dumps(value, ensure_ascii=False))
        case int():
            return str(value)
        case float():
            return _number(value)
        case Mapping():
            return "{" + ",".join(f"{_text(key)}:{_text(v)}" for key, v in value.items()) + "}"
        case _:
            return "[" + ",".join(map(_text, value)) + "]"


def _escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _number(value: float) -> str:
    """Return a float64 as Go writes it: the shortest digits, an exponent only far from one."""
    digits = Decimal(repr(value))
    if value == 0 or _SMALLEST <= abs(value) < _LARGEST:
        text = f"{digits:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    sign, figures, exponent = digits.normalize().as_tuple()
    assert isinstance(exponent, int)
    head, tail = str(figures[0]), "".join(map(str, figures[1:]))
    power = exponent + len(tail)
    shown_power = f"-{-power}" if power < 0 else f"+{power}"
    return ("-" if sign else "") + head + (f".{tail}" if tail else "") + f"e{shown_power}"
