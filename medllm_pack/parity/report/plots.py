"""The three figures that compare variants, as inline SVG from the content of parity.json alone.

Every row or point carries its name and its figure in text, and every mark a title, so that nothing
is said by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from medllm_pack.parity.report.marks import WIDTH, Scale, dot, grid, is_number, svg, text
from medllm_pack.parity.report.markup import Markup, join, tag
from medllm_pack.parity.report.words import Words

Variant = Mapping[str, Any]

_LEFT, _RIGHT = 92.0, 146.0  # room for names and for figures


def divergences(variants: Sequence[Variant], edges: Sequence[float], words: Words) -> Markup:
    """Return the histograms of KLD, one row a variant, on one logarithmic axis."""
    shown = [v for v in variants if v["kld"]]
    if not shown:
        return Markup()
    used = [i for v in shown for i, n in enumerate(v["kld"]["counts"]) if n]
    low, high = _decade(edges, min(used) - 1, math.floor), _decade(edges, max(used), math.ceil)
    low -= 0 in used  # what lies below the first edge has a place of its own
    high = max(high, low + 1)
    axis = Scale(low, high, _LEFT, WIDTH - _RIGHT)
    row, parts = 64.0, []
    for power in range(low, high + 1):
        parts.append(grid(axis(power), 8, 14 + row * len(shown)))
        label = "1" if power == 0 else words.number(10.0**power, ".0e").split("× ")[1]
        parts.append(text(axis(power), 32 + row * len(shown), label, "middle", "tick"))
    for i, v in enumerate(shown):
        parts += _histogram(v, edges, axis, base=10 + row * (i + 1), words=words)
    bottom = 14 + row * len(shown) + 40
    parts.append(text((_LEFT + WIDTH - _RIGHT) / 2, bottom, words("kld_axis"), "middle", "axis"))
    described = (
        words(
            "kld_desc", quant=v["quant"], mean=words.number(v["figures"]["kld_mean"]),
            median=words.number(v["figures"]["kld_median"]),
            p99=words.number(v["figures"]["kld_p99"]),
        )
        for v in shown
    )  # fmt: skip
    return _figure("kld", parts, bottom + 12, described, words)


def sizes(variants: Sequence[Variant], words: Words) -> Markup:
    """Return perplexity against file size, with the original's perplexity as a line."""
    shown = [v for v in variants if is_number(v["figures"].get("ppl")) and v["size"]]
    if not shown:
        return Markup()
    reference = shown[0]["figures"]["ppl_reference"]
    spans = [(v["figures"]["ppl"], _two_errors(v)) for v in shown]
    ends = [reference, *(p + e for p, e in spans), *(p - e for p, e in spans)]
    room = (max(ends) - min(ends)) * 0.12 or 0.01 * reference
    top, bottom = 16.0, 250.0
    y = Scale(min(ends) - room, max(ends) + room, bottom, top)
    x = Scale(0, max(v["size"] for v in shown) * 1.02, 64, WIDTH - 92)
    parts = []
    for value in _steps(y.low, y.high):
        parts.append(tag("line", x1=64, x2=WIDTH - 20, y1=y(value), y2=y(value), class_="grid"))
        parts.append(text(56, y(value) + 4, words.number(value, ".4g"), "end", "tick"))
    for value in _steps(0, x.high):
        parts.append(text(x(value), bottom + 20, words.size(int(value)), "middle", "tick"))
    parts.append(text(64, bottom + 42, words("size_axis") + " →", "start", "axis"))
    line = y(reference)
    parts.append(tag("line", x1=64, x2=WIDTH - 20, y1=line, y2=line, class_="original"))
    parts.append(text(70, line - 6, words("original"), "start", "note"))
    for i, (v, (ppl, error)) in enumerate(zip(shown, spans, strict=True)):
        parts.append(_point(v, x(v["size"]), y(ppl), y(ppl - error), y(ppl + error), i, words))
    described = (_size_said(v, words) for v in shown)
    return _figure("size", parts, bottom + 54, described, words)


def agreement(variants: Sequence[Variant], words: Words) -> Markup:
    """Return the share of the same top token, everywhere and where the original is clear."""
    shown = [v for v in variants if is_number(v["figures"].get("top1"))]
    if not shown:
        return Markup()
    least = min(min(v["figures"]["top1"], v["figures"]["top1_clear"]) for v in shown)
    step = 0.01 if least > 0.96 else 0.02 if least > 0.9 else 0.1
    low = math.floor(least / step - 1e-9) * step
    x, row, parts = Scale(low, 1.0, _LEFT, WIDTH - _RIGHT), 34.0, []
    end = 40 + row * len(shown)
    for i in range(round((1 - low) / step) + 1):
        at = x(low + i * step)
        parts.append(grid(at, 34, end))
        parts.append(text(at, end + 18, words.number(low + i * step, ".0%"), "middle", "tick"))
    parts.append(dot(_LEFT + 6, 14, "open"))
    parts.append(text(_LEFT + 18, 18, words("top_all"), "start", "note"))
    parts.append(dot(_LEFT + 186, 14, "full"))
    parts.append(text(_LEFT + 198, 18, words("top_clear"), "start", "note"))
    described = []
    for i, v in enumerate(shown):
        y = 34 + row * (i + 0.5)
        top, clear = v["figures"]["top1"], v["figures"]["top1_clear"]
        parts.append(text(_LEFT - 12, y + 5, v["quant"], "end", _name_class(v)))
        parts.append(tag("line", x1=x(top), x2=x(clear), y1=y, y2=y, class_="link"))
        parts += [dot(x(top), y, "open"), dot(x(clear), y, "full")]
        written = f"{words.number(top, '.2%')} · {words.number(clear, '.2%')}"
        parts.append(text(WIDTH - _RIGHT + 14, y + 5, written, "start", "value"))
        said = {"all": words.number(top, ".2%"), "clear": words.number(clear, ".2%")}
        described.append(words("top_desc", quant=v["quant"], **said))
    return _figure("top", parts, end + 30, described, words)


def _figure(
    key: str, parts: Iterable[Markup], height: float, described: Iterable[str], words: Words
) -> Markup:
    """Return a figure whose title stands under ``key`` among the words."""
    title = words(f"{key}_title")
    return svg(f"{key}-{words.language}", *parts, height=height, title=title, described=described)


def _histogram(
    v: Variant, edges: Sequence[float], axis: Scale, *, base: float, words: Words
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
    yield tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=base, y2=base, class_="base")
    yield text(_LEFT - 12, base - 8, v["quant"], "end", _name_class(v))
    if is_number(figures["kld_mean"]) and figures["kld_mean"] > 0:
        at = axis(math.log10(figures["kld_mean"]))
        yield tag("line", x1=at, x2=at, y1=base - 50, y2=base, class_="mean")
    mean = words.number(figures["kld_mean"])
    yield text(WIDTH - _RIGHT + 14, base - 8, mean, "start", "value")


def _point(v: Variant, x: float, y: float, low: float, high: float, i: int, words: Words) -> Markup:
    title = _size_said(v, words)
    mark = (
        tag("circle", tag("title", title), cx=x, cy=y, r=6, class_="dot")
        if v["passed"]
        else tag("path", tag("title", title), class_="cross",
                 d=f"M{x - 6:g} {y - 6:g}l12 12m0 -12l-12 12")
    )  # fmt: skip
    # Neighbours write on different sides of their points, so that close ones can be read.
    above = i % 2 == 0
    label = text(x + 10, y - 10 if above else y + 20, v["quant"], "start", _name_class(v))
    return join(tag("line", x1=x, x2=x, y1=low, y2=high, class_="error"), mark, label)


def _size_said(v: Variant, words: Words) -> str:
    ppl = words.number(v["figures"]["ppl"], ".5g")
    return words("size_desc", quant=v["quant"], size=words.size(v["size"]), ppl=ppl)


def _two_errors(v: Variant) -> float:
    error = v["figures"].get("ppl_ratio_error")
    return 2 * error * v["figures"]["ppl_reference"] if is_number(error) else 0.0


def _steps(low: float, high: float) -> Iterator[float]:
    """Yield about five round values of a range."""
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    for i in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield i * step


def _decade(edges: Sequence[float], i: int, rounding: Any) -> int:
    return int(rounding(math.log10(edges[min(max(i, 0), len(edges) - 1)]) - 0.0))


def _bar_class(v: Variant) -> str:
    return "bar" if v["passed"] else "bar bad"


def _name_class(v: Variant) -> str:
    return "name" if v["passed"] else "name bad"
