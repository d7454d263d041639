"""Where a variant's weights lie off the model's: a heat map, layers across, kinds of tensor down.

Every shade is the same error in every map. From the content of parity.json alone.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medllm_pack.parity.report.marks import WIDTH, is_number, svg, text
from medllm_pack.parity.report.markup import Markup, tag
from medllm_pack.parity.report.words import Words

Variant = Mapping[str, Any]

# Relative errors up to which a cell has its shade, the same for all: variants can be compared.
_SHADES = (0.005, 0.01, 0.02, 0.04, 0.08)


def errors(variant: Variant, number: int, words: Words) -> Markup:
    """Return the heat map of one variant: layers across, kinds of tensor down."""
    cells = {_place(t["name"]): t for t in variant["tensors"]}
    layers = sorted({layer for layer, _ in cells if layer is not None})
    kinds = list(dict.fromkeys(kind for layer, kind in cells if layer is not None))
    kinds = [k for k in kinds if any(_error(cells.get((n, k))) for n in layers)]
    others = [kind for layer, kind in cells if layer is None and _error(cells[None, kind])]
    left, right, row = 120.0, 84.0, 24.0
    width = (WIDTH - left - right) / max(len(layers), 1)
    parts: list[Markup] = []
    for i, kind in enumerate([*kinds, *others]):
        outside = kind not in kinds
        y = 26 + row * i + (8 if outside else 0)
        parts.append(text(left - 10, y + 16, kind, "end", "tick"))
        there = [cells.get((None if outside else n, kind)) for n in ([0] if outside else layers)]
        across = width * max(len(layers), 1) if outside else width
        for j, tensor in enumerate(there):
            parts.append(_cell(tensor, left + across * j, y, across, row, words))
        largest = max(map(_error, there))
        parts.append(text(WIDTH - right + 10, y + 16, words.number(largest), "start", "value"))
    parts += _layer_numbers(layers, left, width, words)
    parts.append(text(WIDTH - right + 10, 18, words("heat_largest"), "start", "note"))
    worst = sorted(cells.values(), key=_error, reverse=True)[:3]
    return svg(
        f"heat-{number}-{words.language}", *parts, height=38 + row * len([*kinds, *others]),
        title=f"{words('heat_title')}: {variant['quant']}",
        described=(_said(tensor, words) for tensor in worst),
    )  # fmt: skip


def shades(words: Words) -> Markup:
    """Return the legend of the heat maps."""
    says = [f"≤ {words.number(limit, '.1%')}" for limit in _SHADES]
    says.append(f"> {words.number(_SHADES[-1], '.1%')}")
    parts = []
    for i, said in enumerate(says):
        x = 120 + 86.0 * i
        parts.append(tag("rect", x=x, y=6, width=18, height=16, class_=f"heat h{i + 1}"))
        parts.append(text(x + 24, 19, said, "start", "tick"))
    return svg(
        f"shades-{words.language}", *parts, height=30, title=words("heat_legend"), described=says
    )


def lossy(variant: Variant) -> bool:
    """Say whether any tensor of a variant lies off the model's."""
    return any(_error(tensor) for tensor in variant["tensors"])


def _cell(tensor: Any, x: float, y: float, width: float, height: float, words: Words) -> Markup:
    if tensor is None:
        return Markup()
    error = _error(tensor)
    shade = bisect_left(_SHADES, error) + 1 if error else 0
    side = {"x": round(x + 1, 2), "y": y + 1, "width": round(width - 2, 2), "height": height - 2}
    return tag("rect", tag("title", _said(tensor, words)), class_=f"heat h{shade}", **side)


def _layer_numbers(
    layers: Sequence[int], left: float, width: float, words: Words
) -> Iterator[Markup]:
    yield text(left - 10, 18, words("heat_layer"), "end", "note")
    step = max(1, math.ceil(26 / width))
    for j, layer in enumerate(layers):
        if j % step == 0:
            yield text(left + width * (j + 0.5), 18, str(layer), "middle", "tick")


def _said(tensor: Mapping[str, Any], words: Words) -> str:
    return words(
        "heat_desc", name=tensor["name"], type=tensor["type"], rmse=words.number(tensor["rmse"]),
        cosine=words.number(tensor["cosine"], ".6g"),
    )  # fmt: skip


def _place(name: str) -> tuple[int | None, str]:
    """Return layer and kind: ``blk.3.attn_q.weight`` is (3, "attn_q")."""
    parts = name.removesuffix(".weight").split(".")
    if len(parts) > 2 and parts[0] == "blk" and parts[1].isdecimal():
        return int(parts[1]), ".".join(parts[2:])
    return None, ".".join(parts)


def _error(tensor: Mapping[str, Any] | None) -> float:
    if tensor is None:
        return 0.0
    value = tensor["rmse"]
    return float(value) if is_number(value) else math.inf
