"""``page``: the report as one HTML file, from the content of pack.json and parity.json alone.

No script, no network, no font: a Content-Security-Policy forbids all but the one style, which is
named by its digest. The page holds both languages, and a pair of radio buttons shows one of them.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medllm_pack.parity.checks import form
from medllm_pack.parity.report import heat, plots
from medllm_pack.parity.report.markup import Markup, tag
from medllm_pack.parity.report.words import LANGUAGES, TAGS, Words

Document = Mapping[str, Any]

NAME = "parity.html"

_MARKS = {True: "✓", False: "✗", None: "–"}
_VERDICTS = {True: "passed", False: "failed", None: "unasked"}
_CLASSES = {True: "ok", False: "bad", None: "none"}
# How the reference was computed -> the sentence that says so.
_WAYS = {"layers": "method_layers", "one piece": "method_whole"}
# Column -> figure of parity.json, and how it is written.
_FIGURES = {
    "kld_mean": "#.3g", "kld_p99": "#.3g", "top1": ".2%", "ppl": ".5g", "ppl_ratio": ".4f",
}  # fmt: skip


def page(pack: Document, parity: Document) -> str:
    """Return the report of a pack.

    Args:
        pack: the content of pack.json.
        parity: the content of parity.json.
    """
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    words = Words("pt")
    title = f"{pack['name']} · {words('title')}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    mains = (tag("main", *_body(pack, parity, Words(n)), lang=TAGS[n], class_=n) for n in LANGUAGES)
    body = tag("body", *_switch(words), *mains)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang=TAGS['pt'])}\n"


def _policy(style: str) -> str:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _switch(words: Words) -> Iterator[Markup]:
    """Yield the radio buttons; the style shows the language of the one that is chosen."""
    for name in LANGUAGES:
        chosen = "checked" if name == words.language else None
        yield tag(
            "input", type="radio", name="language", id=f"language-{name}", class_="language",
            checked=chosen,
        )  # fmt: skip
    yield tag(
        "nav",
        *(
            tag("label", Words(name)("language"), for_=f"language-{name}", lang=TAGS[name])
            for name in LANGUAGES
        ),
        aria_label=words("choose"),
    )


def _body(pack: Document, parity: Document, words: Words) -> Iterator[Markup]:
    variants = parity["variants"]
    yield tag(
        "header",
        tag("p", words("kicker"), class_="kicker"),
        tag("h1", words("title")),
        tag("p", pack["name"], class_="pack"),
        tag("p", words("lead"), class_="lead"),
    )
    yield _answer(parity, words)
    yield tag("section", tag("h2", words("overview")), _overview(variants, words))
    yield from _figures(parity, words)
    yield _checks(variants, words)
    yield _meaning(words)
    yield _method(pack, parity, words)


def _answer(parity: Document, words: Words) -> Markup:
    variants = parity["variants"]
    failed = [v for v in variants if not v["passed"]]
    if not failed:
        return tag("section", _mark(True, words, words("yes")), class_="answer ok")
    said = words("no", failed=str(len(failed)), all=str(len(variants)))
    return tag(
        "section", _mark(False, words, said), *(_failure(v, words) for v in failed),
        class_="answer bad",
    )  # fmt: skip


def _mark(passed: bool, words: Words, said: str) -> Markup:
    return tag("p", tag("span", _MARKS[passed], class_="mark", aria_hidden="true"), said,
               class_="verdict")  # fmt: skip


def _failure(variant: Document, words: Words) -> Markup:
    check = next(c for c in variant["checks"] if c["passed"] is False)
    name = words.named("check_names", check["name"])
    cause = words.named("causes", check["name"].partition(".")[0])
    return tag(
        "div",
        tag("p", tag("strong", words("first", quant=variant["quant"], check=name))),
        tag("p", words("found"), " ", words.detail(check["detail"])),
        tag("p", words("usual", cause=cause)),
        class_="failure",
    )


def _overview(variants: list[Any], words: Words) -> Markup:
    rows = [
        tag(
            "tr",
            tag("th", v["quant"], scope="row"),
            tag("td", _chip(v["passed"], words)),
            tag("td", _size(v["size"], words), class_="n"),
            *(tag("td", words.data(v["figures"].get(key), form), class_="n")
              for key, form in _FIGURES.items()),
        )
        for v in variants
    ]  # fmt: skip
    heads = ("variant", "verdict", "size", *_FIGURES)
    return _table(words("overview"), [words(key) for key in heads], rows)


def _size(size: int | None, words: Words) -> Markup:
    value = None if size is None else str(size)
    return tag("data" if value else "span", words.size(size), value=value)


def _chip(passed: bool | None, words: Words) -> Markup:
    mark = tag("span", _MARKS[passed], aria_hidden="true")
    return tag("span", mark, " ", words(_VERDICTS[passed]), class_=f"chip {_CLASSES[passed]}")


def _table(caption: str, heads: list[str], rows: list[Markup]) -> Markup:
    columns = tag("tr", *(tag("th", head, scope="col") for head in heads))
    table = tag("table", tag("caption", caption), tag("thead", columns), tag("tbody", *rows))
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _figures(parity: Document, words: Words) -> Iterator[Markup]:
    variants = parity["variants"]
    yield _figure("kld", plots.divergences(variants, parity["kld"]["edges"], words), words)
    yield _figure("size", plots.sizes(variants, words), words)
    yield _figure("top", plots.agreement(variants, words), words)
    parts = []
    for number, v in enumerate(variants):
        if heat.lossy(v):
            parts += [tag("h3", v["quant"]), _wide(heat.errors(v, number, words), v["quant"])]
        elif v["tensors"]:
            n = str(len(v["tensors"]))
            parts.append(tag("p", words("heat_none", quant=v["quant"], n=n)))
    if parts:
        note = tag("p", words("heat_note"), class_="note")
        legend = _wide(heat.shades(words), words("heat_legend"))
        yield tag("section", tag("h2", words("heat_title")), note, legend, *parts)


def _figure(name: str, drawn: Markup, words: Words) -> Markup:
    if not drawn:
        return Markup()
    title = words(f"{name}_title")
    caption = tag("figcaption", words(f"{name}_note"))
    figure = tag("figure", caption, _wide(drawn, title))
    return tag("section", tag("h2", title), figure, class_=name)


def _wide(drawn: Markup, label: str) -> Markup:
    return tag("div", drawn, class_="scroll", tabindex="0", role="region", aria_label=label)


def _checks(variants: list[Any], words: Words) -> Markup:
    heads = [words(key) for key in ("check", "measured", "limit", "verdict", "detail")]
    parts = [tag("h2", words("checks_title")), tag("p", words("checks_note"), class_="note")]
    for v in variants:
        rows = [_check(c, words) for c in v["checks"]]
        parts += [tag("h3", v["quant"]), _table(v["quant"], heads, rows)]
        if v["limits"]:
            parts.append(_own_limits(v, words))
    return tag("section", *parts, class_="checks")


def _own_limits(variant: Document, words: Words) -> Markup:
    """Return which limits were not the shipped ones."""
    rows = [
        tag(
            "tr",
            tag("th", tag("code", one["name"]), scope="row"),
            tag("td", words.data(one["used"], "g"), class_="n"),
            tag("td", words.data(one["shipped"], "g"), class_="n"),
            tag("td", words("looser" if one["looser"] else "stricter")),
        )
        for one in variant["limits"]
    ]
    heads = [words(key) for key in ("limit", "limit_used", "limit_shipped", "limit_change")]
    return _table(words("own_limits", quant=variant["quant"]), heads, rows)


def _check(check: Document, words: Words) -> Markup:
    measured = check["measured"]
    written = form(measured) if isinstance(measured, float) else "d"
    return tag(
        "tr",
        tag("th", words.named("check_names", check["name"]), scope="row"),
        tag("td", words.data(measured, written), class_="n"),
        tag("td", words.limit(check["limit"]), class_="n"),
        tag("td", _chip(check["passed"], words)),
        tag("td", words.detail(check["detail"]), class_="detail"),
        class_="no" if check["passed"] is False else None,
    )


def _meaning(words: Words) -> Markup:
    terms = []
    for key in ("kld", "top", "ppl", "not"):
        kind = "warning" if key == "not" else None
        terms.append(
            tag("div", tag("dt", words(f"means_{key}_term")), tag("dd", words(f"means_{key}")),
                class_=kind)
        )  # fmt: skip
    return tag("section", tag("h2", words("means_title")), tag("dl", *terms))


def _method(pack: Document, parity: Document, words: Words) -> Markup:
    texts = parity["texts"]
    tokens = max((v["figures"].get("tokens", 0) for v in parity["variants"]), default=0)
    key = "texts_user" if texts["sha256"] is None else "texts_shipped"
    said = words(key, count=str(texts["count"]), name=texts["name"], tokens=str(tokens))
    way, runtime = parity["reference"], parity["llama.cpp"]
    layers = runtime["gpu_layers"]
    points = [
        words("method_reference"),
        words(_WAYS.get(way["way"], "method_layers"), device=way["device"]),
        words("method_variant", ctx=str(runtime["ctx"])),
        words("method_gpu" if layers else "method_cpu", layers=str(layers)),
        words("method_limits"),
    ]
    tools = [
        tag("tr", tag("th", name, scope="row"), tag("td", value))
        for name, value in sorted(parity["tools"].items())
    ]
    digests = [
        tag("tr", tag("th", v["file"], scope="row"), tag("td", tag("code", v["sha256"])))
        for v in pack["variants"]
    ]
    return tag(
        "section",
        tag("h2", words("method_title")),
        tag("ul", *(tag("li", point) for point in (*points, said))),
        tag("h3", words("tools_title")),
        _table(words("tools_title"), [words("tool"), words("version")], tools),
        tag("h3", words("digests_title")),
        _table(words("digests_title"), [words("file"), "SHA-256"], digests),
        tag("p", words("digests_note"), class_="note"),
        class_="method",
    )
