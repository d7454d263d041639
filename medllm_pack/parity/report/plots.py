"""The four figures of the report as inline SVG, from the content of parity.json alone.

Every row or point carries its name and its figure in text, and every mark a title, so that nothing
is said by colour alone. Colours are classes; the page's style gives them, light and dark.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from medllm_pack.parity.report.markup import Markup, join, tag
from medllm_pack.parity.report.words import Words

Variant = Mapping[str, Any]

_WIDTH = 720.0
_LEFT, _RIGHT = 92.0, 146.0  # room for names and for figures
# Relative errors up to which a cell has its shade, the same for all: variants can be compared.
_SHADES = (0.005, 0.01, 0.02, 0.04, 0.08)


def svg(
    name: str, *children: Markup, height: float, title: str, described: Iterable[str]
) -> Markup:
    """Return a figure with a title and a description in words."""
    return tag(
        "svg",
        tag("title", title, id=f"{name}-t"),
        tag("desc", "; ".join(described) + ".", id=f"{name}-d"),
        *children,
        viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img",
        aria_labelledby=f"{name}-t {name}-d",
    )  # fmt: skip


def divergences(variants: Sequence[Variant], edges: Sequence[float], words: Words) -> Markup:
    """Return the histograms of KLD, one row a variant, on one logarithmic axis."""
    shown = [v for v in variants if v["kld"]]
    if not shown:
        return Markup()
    used = [i for v in shown for i, n in enumerate(v["kld"]["counts"]) if n]
    low, high = _decade(edges, min(used) - 1, math.floor), _decade(edges, max(used), math.ceil)
    low -= 0 in used  # what lies below the first edge has a place of its own
    high = max(high, low + 1)
    axis = _Scale(low, high, _LEFT, _WIDTH - _RIGHT)
    row, parts = 64.0, []
    for power in range(low, high + 1):
        parts.append(_grid(axis(power), 8, 14 + row * len(shown)))
        label = "1" if power == 0 else words.number(10.0**power, ".0e").split("× ")[1]
        parts.append(_text(axis(power), 32 + row * len(shown), label, "middle", "tick"))
    for i, v in enumerate(shown):
        parts += _histogram(v, edges, axis, base=10 + row * (i + 1), words=words)
    bottom = 14 + row * len(shown) + 40
    parts.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, bottom, words("kld_axis"), "middle", "axis"))
    described = (
        words(
            "kld_desc", quant=v["quant"], mean=words.number(v["figures"]["kld_mean"]),
            median=words.number(v["figures"]["kld_median"]),
            p99=words.number(v["figures"]["kld_p99"]),
        )
        for v in shown
    )  # fmt: skip
    return svg(
        f"kld-{words.language}", *parts, height=bottom + 12, title=words("kld_title"),
        described=described,
    )  # fmt: skip


def sizes(variants: Sequence[Variant], words: Words) -> Markup:
    """Return perplexity against file size, with the original's perplexity as a line."""
    shown = [v for v in variants if _is_number(v["figures"].get("ppl")) and v["size"]]
    if not shown:
        return Markup()
    reference = shown[0]["figures"]["ppl_reference"]
    spans = [(v["figures"]["ppl"], _two_errors(v)) for v in shown]
    ends = [reference, *(p + e for p, e in spans), *(p - e for p, e in spans)]
    room = (max(ends) - min(ends)) * 0.12 or 0.01 * reference
    top, bottom = 16.0, 250.0
    y = _Scale(min(ends) - room, max(ends) + room, bottom, top)
    x = _Scale(0, max(v["size"] for v in shown) * 1.02, 64, _WIDTH - 92)
    parts = []
    for value in _steps(y.low, y.high):
        parts.append(tag("line", x1=64, x2=_WIDTH - 20, y1=y(value), y2=y(value), class_="grid"))
        parts.append(_text(56, y(value) + 4, words.number(value, ".4g"), "end", "tick"))
    for value in _steps(0, x.high):
        parts.append(_text(x(value), bottom + 20, words.size(int(value)), "middle", "tick"))
    parts.append(_text(64, bottom + 42, words("size_axis") + " →", "start", "axis"))
    line = y(reference)
    parts.append(tag("line", x1=64, x2=_WIDTH - 20, y1=line, y2=line, class_="original"))
    parts.append(_text(70, line - 6, words("original"), "start", "note"))
    for i, (v, (ppl, error)) in enumerate(zip(shown, spans, strict=True)):
        parts.append(_point(v, x(v["size"]), y(ppl), y(ppl - error), y(ppl + error), i, words))
    described = (
        words("size_desc", quant=v["quant"], size=words.size(v["size"]),
              ppl=words.number(v["figures"]["ppl"], ".5g"))
        for v in shown
    )  # fmt: skip
    return svg(
        f"size-{words.language}", *parts, height=bottom + 54, title=words("size_title"),
        described=described,
    )  # fmt: skip


def agreement(variants: Sequence[Variant], words: Words) -> Markup:
    """Return the share of the same top token, everywhere and where the original is clear."""
    shown = [v for v in variants if _is_number(v["figures"].get("top1"))]
    if not shown:
        return Markup()
    least = min(min(v["figures"]["top1"], v["figures"]["top1_clear"]) for v in shown)
    step = 0.01 if least > 0.96 else 0.02 if least > 0.9 else 0.1
    low = math.floor(least / step - 1e-9) * step
    x, row, parts = _Scale(low, 1.0, _LEFT, _WIDTH - _RIGHT), 34.0, []
    end = 40 + row * len(shown)
    for i in range(round((1 - low) / step) + 1):
        at = x(low + i * step)
        parts.append(_grid(at, 34, end))
        parts.append(_text(at, end + 18, words.number(low + i * step, ".0%"), "middle", "tick"))
    parts.append(_dot(_LEFT + 6, 14, "open"))
    parts.append(_text(_LEFT + 18, 18, words("top_all"), "start", "note"))
    parts.append(_dot(_LEFT + 186, 14, "full"))
    parts.append(_text(_LEFT + 198, 18, words("top_clear"), "start", "note"))
    described = []
    for i, v in enumerate(shown):
        y = 34 + row * (i + 0.5)
        top, clear = v["figures"]["top1"], v["figures"]["top1_clear"]
        parts.append(_text(_LEFT - 12, y + 5, v["quant"], "end", _name_class(v)))
        parts.append(tag("line", x1=x(top), x2=x(clear), y1=y, y2=y, class_="link"))
        parts += [_dot(x(top), y, "open"), _dot(x(clear), y, "full")]
        written = f"{words.number(top, '.2%')} · {words.number(clear, '.2%')}"
        parts.append(_text(_WIDTH - _RIGHT + 14, y + 5, written, "start", "value"))
        said = {"all": words.number(top, ".2%"), "clear": words.number(clear, ".2%")}
        described.append(words("top_desc", quant=v["quant"], **said))
    return svg(
        f"top-{words.language}", *parts, height=end + 30, title=words("top_title"),
        described=described,
    )  # fmt: skip


def errors(variant: Variant, number: int, words: Words) -> Markup:
    """Return the heat map of one variant: layers across, kinds of tensor down."""
    cells = {_place(t["name"]): t for t in variant["tensors"]}
    layers = sorted({layer for layer, _ in cells if layer is not None})
    kinds = list(dict.fromkeys(kind for layer, kind in cells if layer is not None))
    kinds = [k for k in kinds if any(_error(cells.get((n, k))) for n in layers)]
    others = [kind for layer, kind in cells if layer is None and _error(cells[None, kind])]
    left, right, row = 120.0, 84.0, 24.0
    width = (_WIDTH - left - right) / max(len(layers), 1)
    parts: list[Markup] = []
    for i, kind in enumerate([*kinds, *others]):
        outside = kind not in kinds
        y = 26 + row * i + (8 if outside else 0)
        parts.append(_text(left - 10, y + 16, kind, "end", "tick"))
        there = [cells.get((None if outside else n, kind)) for n in ([0] if outside else layers)]
        across = width * max(len(layers), 1) if outside else width
        for j, tensor in enumerate(there):
            parts.append(_cell(tensor, left + across * j, y, across, row, words))
        largest = max(map(_error, there))
        parts.append(_text(_WIDTH - right + 10, y + 16, words.number(largest), "start", "value"))
    parts += _layer_numbers(layers, left, width, words)
    parts.append(_text(_WIDTH - right + 10, 18, words("heat_largest"), "start", "note"))
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
        parts.append(_text(x + 24, 19, said, "start", "tick"))
    return svg(
        f"shades-{words.language}", *parts, height=30, title=words("heat_legend"), described=says
    )


def lossy(variant: Variant) -> bool:
    """Say whether any tensor of a variant lies off the model's."""
    return any(_error(tensor) for tensor in variant["tensors"])


class _Scale:
    """A linear axis."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + min(max(share, -0.1), 1.1) * (self.end - self.start), 2)


def _histogram(
    v: Variant, edges: Sequence[float], axis: _Scale, *, base: float, words: Words
) -> Iterator[Markup]:
    counts, figures = v["kld"]["counts"], v["figures"]
    tallest = max(counts)
    for i, n in enumerate(counts):
        if n:
            start = axis(math.log10(edges[max(i - 1, 0)]) - (0.25 if i == 0 else 0))
            end = axis(math.log10(edges[i]) if i < len(edges) else axis.high)
            height = round(max(46 * n / tallest, 1), 2)
            yield tag(
                "rect", tag("title", f"{v['quant']}: {n}"), x=start, y=base - height,
                width=round(max(end - start - 1, 1), 2), height=height, class_=_bar_class(v),
            )  # fmt: skip
    yield tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=base, y2=base, class_="base")
    yield _text(_LEFT - 12, base - 8, v["quant"], "end", _name_class(v))
    if _is_number(figures["kld_mean"]) and figures["kld_mean"] > 0:
        at = axis(math.log10(figures["kld_mean"]))
        yield tag("line", x1=at, x2=at, y1=base - 50, y2=base, class_="mean")
    mean = words.number(figures["kld_mean"])
    yield _text(_WIDTH - _RIGHT + 14, base - 8, mean, "start", "value")


def _point(v: Variant, x: float, y: float, low: float, high: float, i: int, words: Words) -> Markup:
    title = words("size_desc", quant=v["quant"], size=words.size(v["size"]),
                  ppl=words.number(v["figures"]["ppl"], ".5g"))  # fmt: skip
    mark = (
        tag("circle", tag("title", title), cx=x, cy=y, r=6, class_="dot")
        if v["passed"]
        else tag("path", tag("title", title), class_="cross",
                 d=f"M{x - 6:g} {y - 6:g}l12 12m0 -12l-12 12")
    )  # fmt: skip
    # Neighbours write on different sides of their points, so that close ones can be read.
    above = i % 2 == 0
    label = _text(x + 10, y - 10 if above else y + 20, v["quant"], "start", _name_class(v))
    return join(tag("line", x1=x, x2=x, y1=low, y2=high, class_="error"), mark, label)


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
    yield _text(left - 10, 18, words("heat_layer"), "end", "note")
    step = max(1, math.ceil(26 / width))
    for j, layer in enumerate(layers):
        if j % step == 0:
            yield _text(left + width * (j + 0.5), 18, str(layer), "middle", "tick")


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
    return float(value) if _is_number(value) else math.inf


def _two_errors(v: Variant) -> float:
    error = v["figures"].get("ppl_ratio_error")
    return 2 * error * v["figures"]["ppl_reference"] if _is_number(error) else 0.0


def _steps(low: float, high: float) -> Iterator[float]:
    """Yield about five round values of a range."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield i * step


def _decade(edges: Sequence[float], i: int, rounding: Any) -> int:
    return int(rounding(math.log10(edges[min(max(i, 0), len(edges) - 1)]) - 0.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _bar_class(v: Variant) -> str:
    return "bar" if v["passed"] else "bar bad"


def _name_class(v: Variant) -> str:
    return "name" if v["passed"] else "name bad"


def _grid(x: float, top: float, bottom: float) -> Markup:
    return tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid")


def _dot(x: float, y: float, kind: str) -> Markup:
    return tag("circle", cx=x, cy=y, r=6, class_=f"dot {kind}")


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> Markup:
    return tag("text", text, x=round(x, 2), y=round(y, 2), text_anchor=anchor, class_=kind)
