"""The report: one page that needs nothing, says what parity.json says, and believes no name."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest

from medllm_pack.parity.checks import CAUSES, Check, Rung, TensorError, Verdict
from medllm_pack.parity.measures import KLD_EDGES, KLD_QUANTILES, Spread
from medllm_pack.parity.record import describe
from medllm_pack.parity.report import details
from medllm_pack.parity.report.details import translate
from medllm_pack.parity.report.markup import escape, tag
from medllm_pack.parity.report.page import page
from medllm_pack.parity.report.words import LANGUAGES, Words, table
from medllm_pack.parity.texts import shipped_texts
from medllm_pack.parity.ways import ON_CPU
from tests.chromium import Browser

HOSTILE = "</style></svg><script>alert(1)</script>\"'&\x00\u202e"
CHECKS = (
    ("file.digest", 0, "= 0 differ"), ("settings", 0, "= 0 differ"),
    ("merge.pairs", 4, "= 4 pairs"), ("weights.exact", 0, "= 0 values differ"),
    ("weights.rmse", 0.0771, "<= 0.11"), ("weights.cosine", 0.997029, ">= 0.993932"),
    ("tokens.ids", 0, "= 0 differ"), ("logits.kld_mean", 0.0186325, "<= 0.1"),
    ("logits.ppl_ratio", 1.01744, "1 ± 0.1"),
)  # fmt: skip

RUNTIME = {"ctx": 256, "gpu_layers": 0}


def verdict(quant: str, *, error: float, failed: str | None = None, size: int) -> Verdict:
    """Return a verdict of a model of 32 layers whose figures follow from ``error``."""
    checks = tuple(
        Check(name, value, limit, name != failed, f"detail of {name}")
        for name, value, limit in CHECKS
    )
    figures = {
        "kld_mean": error / 4, "kld_median": error / 8, "kld_p99": error * 2, "kld_max": error * 9,
        "top1": 1 - error / 2, "top1_clear": 1 - error / 50, "ppl": 6.15686 * (1 + error / 4),
        "ppl_reference": 6.15686, "ppl_ratio": 1 + error / 4, "ppl_ratio_error": 0.0028,
        "tokens": 3486, "tokens_clear": 2238,
    }  # fmt: skip
    middle = sum(edge < error for edge in KLD_EDGES) - 3
    counts = [max(0, 900 - 60 * (i - middle) ** 2) for i in range(len(KLD_EDGES) + 1)]
    spread = Spread(tuple(counts), tuple(error * q for q in KLD_QUANTILES))
    kinds = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
    tensors = tuple(
        TensorError(f"blk.{i}.{kind}.weight", "Q4_K", error * (1 + i / 40 + j / 9) * (j > 0), 1, 0)
        for i in range(32)
        for j, kind in enumerate(kinds)
    )
    output = TensorError("output.weight", "Q6_K", error / 3, 0.999, 0)
    return Verdict(quant, checks, figures, spread, (*tensors, output), size)


def documents(*, failed: str | None = None, more: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what pack.json and parity.json hold of a pack of three variants, and ``more``."""
    verdicts = [
        verdict("f16", error=0.0, size=15793952),
        verdict("q6_k", error=0.018, size=6516512),
        verdict("q4_k_m", error=0.077, size=4826912, failed=failed),
        *(verdict(f"q3_k_{i}", error=0.1 + i / 50, size=3600000) for i in range(more)),
    ]
    pack = {
        "name": "medllm-tiny",
        "variants": [
            {"quant": v.quant, "file": f"medllm-{v.quant}.gguf", "sha256": "0123456789abcdef" * 4}
            for v in verdicts
        ],
    }
    way = ON_CPU.document()
    return pack, json.loads(json.dumps(describe(shipped_texts(count=2), verdicts, way, RUNTIME)))


@pytest.fixture(scope="module")
def sound() -> str:
    return page(*documents())


@pytest.fixture(scope="module")
def failing() -> str:
    return page(*documents(failed="weights.rmse"))


class Elements(HTMLParser):
    """Elements with attributes and text; refuses what is not nested rightly."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[int] = []
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), attrs
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "br", "input"):
            self.open.append(len(self.found) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        assert self.found[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for i in self.open:
            self.found[i][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attrs, "".join(text)) for name, attrs, text in self.found if name == tag]


# --- the page as text


@pytest.mark.parametrize("failed", [None, "weights.rmse"])
def test_page_is_nested_rightly_with_headings_headers_and_titles(failed: str | None) -> None:
    elements = Elements(page(*documents(failed=failed)))
    ids = [attrs["id"] for _, attrs, _ in elements.found if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert len(elements.all("h1")) == 2
    assert all(attrs.get("scope") in ("row", "col") for attrs, _ in elements.all("th"))
    figures = elements.all("svg")
    assert len(figures) == 2 * 6  # two heat maps and their legend; f16 needs none
    for attrs, _ in figures:
        assert set((attrs["aria-labelledby"] or "").split()) <= set(ids)
    assert len(elements.all("caption")) == len(elements.all("table"))


def test_page_names_no_place_outside_and_no_script(sound: str) -> None:
    assert not re.search(r"(?i)https?:|url\(|@import|<script|<link|<img|src=|href=|\son\w+=", sound)
    elements = Elements(sound)
    [policy] = [a["content"] for a, _ in elements.all("meta") if a.get("http-equiv")]
    [(_, style)] = elements.all("style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_same_documents_give_the_same_bytes(sound: str) -> None:
    assert page(*documents()) == sound


def test_every_figure_is_parity_jsons_as_rounded_for_display(sound: str) -> None:
    _, parity = documents()
    numbers: list[float] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)
        elif isinstance(value, int | float):
            numbers.append(float(value))

    collect(parity)
    shown = Elements(sound).all("data")
    # Size and five figures, and every check, of each variant in each language.
    assert len(shown) == 2 * 3 * (6 + len(CHECKS))
    for attrs, text in shown:
        value = float(attrs["value"] or "")
        assert value in numbers
        assert read(text) == pytest.approx(value, rel=0.011, abs=1e-300), (text, value)


def read(text: str) -> float:
    """Return the number that a reader sees."""
    plain = text.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻−,", "0123456789--.")).replace(" × 10", "e")
    number, unit = re.fullmatch(r"([-\d.e]+)(%| [KMG]?B)?", plain).groups()  # type: ignore[union-attr]
    scale = {"%": 0.01, " KB": 1e3, " MB": 1e6, " GB": 1e9}.get(unit, 1)
    return float(number) * scale if unit != " MB" or "." in number else (float(number) + 0.8) * 1e6


def test_failure_is_named_with_its_cause_in_both_languages(failing: str) -> None:
    text = " ".join(t for _, t in Elements(failing).all("main"))
    assert "Não. Variantes que falharam: 1 de 3." in text
    assert "No. Variants that failed: 1 of 3." in text
    assert "q4_k_m falhou primeiro em: pesos: erro relativo." in text
    assert "detail of weights.rmse" in text
    assert f"Usual cause: {CAUSES['weights']}." in text


def test_hostile_names_are_text() -> None:
    pack, parity = documents(failed="weights.rmse")
    pack["name"] = HOSTILE
    parity["texts"]["name"] = HOSTILE
    parity["reference"] = {"device": HOSTILE, "way": HOSTILE}
    parity["tools"][HOSTILE] = HOSTILE
    for file, variant in zip(pack["variants"], parity["variants"], strict=True):
        file["file"] = file["sha256"] = variant["quant"] = HOSTILE
        for tensor in variant["tensors"]:
            tensor["type"] = HOSTILE
            tensor["name"] = f"blk.0.{HOSTILE}"
        for check in variant["checks"]:
            check["detail"] = check["name"] = check["limit"] = HOSTILE
    text = page(pack, parity)
    elements = Elements(text)
    assert elements.all("script") == []
    assert len(elements.all("style")) == 1
    assert "\x00" not in text
    assert "\u202e" not in text


def test_page_stands_where_nothing_could_be_measured() -> None:
    pack, parity = documents(failed="file.digest")
    for variant in parity["variants"]:
        variant.update(kld=None, tensors=[], size=None, figures={})
    assert Elements(page(pack, parity)).all("svg") == []
    pack, parity = documents(failed="file.digest")
    figures = parity["variants"][1]["figures"]
    for name in figures:
        if name not in ("tokens", "tokens_clear"):
            figures[name] = "nan"
    parity["variants"][1]["tensors"][5]["rmse"] = "inf"
    Elements(page(pack, parity))


@pytest.mark.parametrize("n", [1, 2])
def test_page_stands_for_few_layers_and_few_tokens(n: int) -> None:
    pack, parity = documents()
    parity = copy.deepcopy(parity)
    for variant in parity["variants"]:
        variant["tensors"] = variant["tensors"][:n]
        variant["kld"]["counts"] = [n] + [0] * len(KLD_EDGES)
    Elements(page(pack, parity))


# --- its words


def entries(node: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    if all(isinstance(value, str) for value in node.values()):
        return [(path, node)]
    return [found for key, value in node.items() for found in entries(value, f"{path}/{key}")]


def test_every_text_is_there_in_both_languages_with_the_same_places() -> None:
    for key, entry in entries(table()):
        assert set(entry) == set(LANGUAGES), key
        places = [sorted(re.findall(r"{(\w+)}", entry[name])) for name in LANGUAGES]
        assert places[0] == places[1], key
        assert all(entry[name].strip() for name in LANGUAGES), key


def test_every_rung_has_its_cause_as_the_terminal_says_it() -> None:
    causes = table()["causes"]
    for rung in get_args(Rung):
        assert causes[rung]["en"] == CAUSES[rung]


def sentences() -> list[dict[str, str]]:
    path = Path(details.__file__).with_name("details.toml")
    found: list[dict[str, str]] = tomllib.loads(path.read_text(encoding="utf-8"))["details"]
    return found


@pytest.mark.parametrize("entry", sentences(), ids=lambda entry: entry["en"][:40])
def test_sentence_is_found_by_itself_and_says_the_same_things(entry: dict[str, str]) -> None:
    assert set(entry) == {"en", "pt"}
    places = re.findall(r"{(\w+)}", entry["en"])
    assert sorted(places) == sorted(re.findall(r"{(\w+)}", entry["pt"]))
    values = {name: f"<{name}>" for name in places}
    parts = translate(entry["en"].format(**values), str)
    assert "".join(part.text for part in parts) == entry["pt"].format(**values)
    assert [part.text for part in parts if part.foreign] == ["<reason>"] * ("reason" in places)


def test_details_are_translated_one_by_one_and_foreign_words_are_marked() -> None:
    pt, en = Words("pt"), Words("en")
    several = "a.x: 1 of 5 values differ; a.y is all zero; and 4 more tensors"
    assert pt.detail(several) == "a.x: 1 de 5 valores diferem; a.y é todo zero; e mais 4 tensores"
    assert en.detail(several) == several
    assert pt.detail("nats; median 0.0012, largest 1.3e-06") == (
        "nats; mediana 0,0012, maior 1,3e−06"
    )
    assert pt.detail("rope is '500000.0', the model has 10000.0 (and 2 more)") == (
        "rope é &#x27;500000.0&#x27;, no modelo é 10000.0 (e mais 2)"
    )
    assert pt.detail("stop 'a; b' can never occur: the model would spell it 'c; d'") == (
        "a parada &#x27;a; b&#x27; nunca pode ocorrer: o modelo escreveria &#x27;c; d&#x27;"
    )
    assert pt.detail("llama.cpp does not load x: <bad> magic") == (
        'o llama.cpp não carrega x: <span lang="en">&lt;bad&gt; magic</span>'
    )


@pytest.mark.parametrize(
    "part", [" of ", "; ", "not asked: ", "token 1 is 2, not 3; ", " (and 1 more)", "a is b, the "]
)
def test_no_text_takes_long_to_translate(part: str) -> None:
    start = time.perf_counter()
    for n in (12, 1900 // len(part), 100_000):
        translate(part * n, str)
    assert time.perf_counter() - start < 2


def test_numbers_are_written_as_the_language_does() -> None:
    pt, en = Words("pt"), Words("en")
    assert (pt.number(1.3e-6), en.number(1.3e-6)) == ("1,30 × 10⁻⁶", "1.30 × 10⁻⁶")
    assert (pt.number(0.0186325), en.number(-0.5)) == ("0,0186", "−0.500")
    assert (pt.number(None), en.number("nan"), en.number("inf")) == ("–", "–", "∞")
    assert pt.limit("<= 0.11") == "≤ 0,11"
    assert en.limit("= 32 pairs") == "= 32 pairs"
    assert pt.limit("= 0 differ") == "= 0 diferenças"
    assert pt.limit("= 1") == "= 1"


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "<b>&", class_='"') == '<p class="&quot;">&lt;b&gt;&amp;</p>'
    assert escape("a\x00\u202e\u200b") == "a\ufffd\ufffd\ufffd"


# --- the page in a browser


def luminance(color: str) -> float:
    parts = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


CONTRASTS = """(() => {
  const ground = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (c !== 'rgba(0, 0, 0, 0)') return c; } return 'rgb(255, 255, 255)'; };
  const seen = new Set();
  for (const e of document.querySelectorAll('main.pt *, nav label')) {
    if (e.closest('svg') && e.tagName !== 'text') continue;
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const s = getComputedStyle(e);
    seen.add((e.tagName === 'text' ? s.fill : s.color) + '|' + ground(e)); }
  return [...seen]; })()"""
WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth, innerWidth]"
SHOWN = "[...document.querySelectorAll('main')].map(m => getComputedStyle(m).display)"


@pytest.mark.chromium
def test_page_in_a_browser(browser: Browser, failing: str, tmp_path: Path) -> None:
    path = tmp_path / "parity.html"
    path.write_text(failing, encoding="utf-8")
    browser.open(path)
    assert browser.requests() == [path.as_uri()]
    assert browser.evaluate("document.title") == "medllm-tiny · Ainda é o mesmo modelo?"
    assert browser.evaluate(SHOWN) == ["block", "none"]
    for scheme in ("light", "dark"):
        browser.color_scheme(scheme)
        pairs = browser.evaluate(CONTRASTS)
        assert len(pairs) >= 4
        for pair in pairs:
            one, other = sorted(map(luminance, pair.split("|")), reverse=True)
            assert (one + 0.05) / (other + 0.05) >= 4.5, (scheme, pair)
    for width in (360, 1100):
        browser.width(width)
        wide, there, window = browser.evaluate(WIDTHS)
        assert wide <= there <= window == width
    pdf = browser.print()
    assert pdf.startswith(b"%PDF-")
    assert len(pdf) > 20_000
    browser.evaluate("document.querySelector('label[for=language-en]').click()")
    assert browser.evaluate(SHOWN) == ["none", "block"]
    foreign = "[...document.querySelectorAll('main.pt [lang=en]')].map(e => e.textContent)"
    assert set(browser.evaluate(foreign)) == {f"detail of {name}" for name, _, _ in CHECKS}
    assert browser.requests() == [path.as_uri()]
    assert browser.complaints() == []


# A4 without its margins, in CSS pixels: what the style's @page says.
PAPER = (180 / 25.4 * 96, 269 / 25.4 * 96)
BOTTOM = "document.querySelector('main.pt .{} figure').getBoundingClientRect().bottom"
BARS_AND_NAMES = """(() => {
  const boxes = s => [...document.querySelectorAll('main.pt .kld svg ' + s)]
    .map(e => e.getBoundingClientRect());
  return [Math.max(...boxes('text.name').map(b => b.right)),
          Math.min(...boxes('rect').map(b => b.left))]; })()"""


@pytest.mark.chromium
@pytest.mark.parametrize("failed", [None, "weights.rmse"])
def test_first_sheet_of_paper_is_full(browser: Browser, tmp_path: Path, failed: str | None) -> None:
    path = tmp_path / "parity.html"
    path.write_text(page(*documents(failed=failed, more=0 if failed else 2)), encoding="utf-8")
    browser.open(path)
    browser.media("print")
    browser.width(int(PAPER[0]))
    second, third = (browser.evaluate(BOTTOM.format(name)) for name in ("size", "top"))
    browser.media("")
    # Two figures are on it, and a third would not have found a place.
    assert 0.8 * PAPER[1] < second <= PAPER[1] < third


@pytest.mark.chromium
def test_report_of_three_variants_takes_four_sheets(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "parity.html"
    path.write_text(page(*documents()), encoding="utf-8")
    browser.open(path)
    assert len(re.findall(rb"/Type\s*/Page\b", browser.print())) == 4


@pytest.mark.chromium
def test_bars_do_not_cover_names(browser: Browser, sound: str, tmp_path: Path) -> None:
    """The f16 of the documents has divergences below the first edge."""
    path = tmp_path / "parity.html"
    path.write_text(sound, encoding="utf-8")
    browser.open(path)
    browser.width(1100)
    names, bars = browser.evaluate(BARS_AND_NAMES)
    assert names < bars


def test_page_says_how_llama_cpp_was_run(sound: str) -> None:
    assert "at most 256 of each text (--ctx)" in sound
    assert "llama.cpp computed on the processor." in sound
    pack, parity = documents()
    parity["llama.cpp"] = {"ctx": 64, "gpu_layers": "all"}
    assert "computed layers on a GPU (--gpu-layers all)" in page(pack, parity)
