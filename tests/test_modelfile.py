from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import unicodedata
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medllm_pack.errors import ModelfileError, RecipeError, UsageError
from medllm_pack.ollama.modelfile import Modelfile, render
from medllm_pack.ollama.names import ModelName
from medllm_pack.ollama.rules import PARAMETERS, ParameterValue, survives
from medllm_pack.ollama.style import Style, style_names, template_sha256
from tests.conftest import Renderer
from tests.ollama_parser import Command, ParseError, parse

STYLES = ("continuacao", "nota-clinica", "sumario-alta")
FRAMED = ("nota-clinica", "sumario-alta")
REPOSITORY = Path(__file__).parents[1]
PLAIN = Modelfile(from_="./model.gguf", template="{{ .Prompt }}")

# Invented for these tests.
FIRST = "Homem, 58 anos, hipertenso. Dor torácica em aperto há 2 horas. PA 150/90 mmHg."
ANSWER = "Paciente hipertenso, com dor torácica em aperto há 2 horas."
SECOND = "ECG sem supradesnivelamento de ST."

Chat = list[tuple[str, str]]


# What is written is what Ollama reads.


def read_back(text: str) -> Modelfile:
    """Build the value that Ollama's parser and api.FormatParams make of a Modelfile."""
    commands = parse(text)
    parameters: dict[str, ParameterValue] = {}
    for command in commands:
        if command.name == "stop":
            earlier = parameters.get("stop", ())
            assert isinstance(earlier, tuple)
            parameters["stop"] = (*earlier, command.args)
        elif command.name in PARAMETERS:
            parameters[command.name] = json.loads(command.args)
    return Modelfile(
        from_=only(commands, "model"),
        template=only(commands, "template"),
        system=only(commands, "system"),
        parameters=parameters,
        license=tuple(command.args for command in commands if command.name == "license"),
    )


def only(commands: list[Command], name: str) -> str:
    found = [command.args for command in commands if command.name == name]
    assert len(found) <= 1
    return found[0] if found else ""


# Letters, marks that combine, signs, and all that means something to a parser or to Go.
HARMLESS = st.text(
    st.sampled_from("abzçãéõÂ°µ≥½“”´`ẞ日\u0301\u0303\"'\\#{}<>/:.-_ \t\n") | st.just('"'),
    max_size=40,
).filter(lambda text: '"""' not in text)
ANYTHING = st.lists(
    st.text(max_size=8) | st.sampled_from(['"""', "\n", '"', "\r", "FROM x", "ADAPTER", " "])
).map("".join)
STOPS = st.lists(HARMLESS.filter(bool), max_size=3).map(
    lambda stops: tuple(s for s in stops if sum(t in s for t in stops) == 1)
)
NUMBERS = st.fixed_dictionaries(
    {},
    optional={
        "num_ctx": st.integers(1, 2**31 - 1),
        "seed": st.integers(-(2**31) + 1, 2**31 - 1),
        "temperature": st.floats(0, 1e38),
        "min_p": st.floats(0, 1),
        "use_mmap": st.booleans(),
    },
)


def _with_stops(numbers: dict[str, Any], stops: tuple[str, ...]) -> dict[str, ParameterValue]:
    return numbers | ({"stop": stops} if stops else {})


MODELFILES = st.builds(
    Modelfile,
    from_=st.just("./model.gguf"),
    template=HARMLESS.filter(bool),
    system=HARMLESS,
    parameters=st.builds(_with_stops, NUMBERS, STOPS),
    license=st.lists(HARMLESS, max_size=2).map(tuple),
)


@settings(max_examples=400, deadline=None)
@given(value=MODELFILES)
def test_harmless_texts_are_read_back_as_they_were(value: Modelfile) -> None:
    assert read_back(render(value)) == value


@settings(max_examples=400, deadline=None)
@given(system=ANYTHING, stop=ANYTHING)
@example(system='a"""\nADAPTER x', stop="b")
@example(system="10\u00a0mg", stop="b")
@example(system="a", stop='"\n')
def test_any_text_is_refused_or_read_back_as_it_was(system: str, stop: str) -> None:
    value = replace(PLAIN, system=system, parameters={"stop": (stop,)})
    try:
        text = render(value)
    except ModelfileError:
        return
    assert read_back(text) == value


@pytest.mark.parametrize(
    "text",
    [
        '"',
        '""',
        '"a',
        'a"',
        '"a"',
        '""a""',
        " a ",
        "\ta\t",
        "\n\n",
        "\na\n",
        "# a",
        'a "b"\nc "d"\ne',
    ],
)
def test_quotes_spaces_and_line_breaks_at_the_ends_survive(text: str) -> None:
    value = Modelfile("./a b.gguf", text, text, {"stop": (text,)}, (text, text))
    assert read_back(render(value)) == value


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_both_unicode_forms_of_an_accent_survive(form: Any) -> None:
    text = unicodedata.normalize(form, "Nota clínica: não há febre, 38 °C")
    value = replace(PLAIN, system=text)
    assert read_back(render(value)).system == text


@pytest.mark.parametrize("name", STYLES)
def test_every_shipped_style_is_read_back_as_it_was(name: str) -> None:
    value = Style.load(name).modelfile("./model.gguf", license=("Licence\n",))
    expected = dict(value.parameters or {})
    if not expected["stop"]:
        del expected["stop"]
    assert read_back(render(value)) == replace(value, parameters=expected)


def test_the_text_does_not_depend_on_the_order_of_the_parameters() -> None:
    one: dict[str, ParameterValue] = {"seed": 1, "num_ctx": 2, "stop": ("a", "b")}
    other = dict(reversed(one.items()))
    assert render(replace(PLAIN, parameters=one)) == render(replace(PLAIN, parameters=other))


def test_the_header_tells_how_to_use_the_file() -> None:
    text = render(PLAIN, name="clinical-br:7b", file="Modelfile.q4_k_m")
    assert "#   ollama create clinical-br:7b -f Modelfile.q4_k_m\n" in text
    assert text.index("ollama create") < text.index("FROM")


def test_a_modelfile_without_texts_has_only_the_lines_it_needs() -> None:
    assert [command.name for command in parse(render(PLAIN))] == ["model", "template"]


# What would be lost or changed is refused.

DROPPED = {
    "\u00a0": "NO-BREAK SPACE",
    "\u2007": "FIGURE SPACE",
    "\u3000": "IDEOGRAPHIC SPACE",
    "\u200b": "ZERO WIDTH SPACE",
    "\u200d": "ZERO WIDTH JOINER",
    "\u00ad": "SOFT HYPHEN",
    "\u202e": "RIGHT-TO-LEFT OVERRIDE",
    "\ufeff": "ZERO WIDTH NO-BREAK SPACE",
    "\u2028": "LINE SEPARATOR",
    "\u2029": "PARAGRAPH SEPARATOR",
    "\x85": "NEXT LINE",
    "\x1b": "ESCAPE",
    "\0": "NULL",
    "\x7f": "DELETE",
    "\ue000": "without a name",
    "\U000e0041": "TAG LATIN CAPITAL LETTER A",
}


@pytest.mark.parametrize("char", DROPPED)
def test_a_character_that_ollama_drops_is_refused_with_place_and_name(char: str) -> None:
    system = f"Dor.\n10{char}mg"
    naive = f'FROM ./model.gguf\nSYSTEM """{system}"""\n'
    assert only(parse(naive), "system") == "Dor.\n10mg", "the second reader does not drop it"
    with pytest.raises(ModelfileError, match="SYSTEM, line 2, column 3") as caught:
        render(replace(PLAIN, system=system))
    assert f"U+{ord(char):04X} ({DROPPED[char]}) is dropped by Ollama; " in str(caught.value)


@pytest.mark.parametrize(
    ("char", "remedy"),
    [
        ("\u00a0", "write an ordinary space"),
        ("\u2028", "break the line with LF"),
        ("\u200b", "delete it"),
        ("\r", "save the text with LF line ends"),
        ("\ud800", "write the whole character"),
        ("\u0378", "write it another way"),
    ],
)
def test_a_refusal_says_what_to_do(char: str, remedy: str) -> None:
    with pytest.raises(ModelfileError, match=remedy):
        render(replace(PLAIN, system=char))


def test_a_refusal_counts_the_other_characters() -> None:
    with pytest.raises(ModelfileError, match=r"column 3: U\+00A0 .* \(and 2 more"):
        render(replace(PLAIN, system="10\u00a0mg, 5\u00a0ml, 2\u00a0g"))


def test_no_character_that_is_let_through_is_dropped_by_the_parser() -> None:
    through = "".join(char for char in map(chr, range(0x110000)) if survives(char))
    assert len(through) > 90_000
    value = replace(PLAIN, system=through)
    assert read_back(render(value)).system == through


@pytest.mark.parametrize("field", ["template", "system", "license", "stop"])
def test_three_quotes_cannot_smuggle_in_commands(field: str) -> None:
    evil = 'a"""\nADAPTER ./evil\nSYSTEM """b'
    naive = f'FROM ./model.gguf\nSYSTEM """{evil}"""\n'
    assert Command("adapter", "./evil") in parse(naive), "the attack itself does not work"
    value = {
        "template": replace(PLAIN, template=evil),
        "system": replace(PLAIN, system=evil),
        "license": replace(PLAIN, license=(evil,)),
        "stop": replace(PLAIN, parameters={"stop": (evil,)}),
    }[field]
    with pytest.raises(ModelfileError, match="line 1, column 2: three quotes"):
        render(value)


@pytest.mark.parametrize(
    "from_",
    [
        "./a\nADAPTER ./evil",
        "./a.gguf ",
        "../a.gguf",
        "./..",
        "./../a.gguf",
        "/a.gguf",
        "~/a.gguf",
        "./a/b.gguf",
        ".\\a.gguf",
        "./",
        "llama2",
        "./a\u200b.gguf",
        "",
    ],
)
def test_the_weights_can_only_be_a_file_beside_the_modelfile(from_: str) -> None:
    with pytest.raises(ModelfileError, match="FROM"):
        render(replace(PLAIN, from_=from_))


def test_the_header_cannot_smuggle_in_commands() -> None:
    with pytest.raises(ModelfileError, match="header"):
        render(PLAIN, name="a\nADAPTER ./evil")
    with pytest.raises(ModelfileError, match="header"):
        render(PLAIN, file="a\nADAPTER ./evil")


def test_an_empty_template_is_refused() -> None:
    with pytest.raises(ModelfileError, match="TEMPLATE is empty"):
        render(replace(PLAIN, template=""))


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ModelfileError) as caught:
        render(Modelfile("x", "\u00a0", "\u200b", {"num_ctxt": 1}, ("\x1b",)))
    for part in ("FROM", "TEMPLATE", "SYSTEM", "'num_ctxt'; did you mean 'num_ctx'?", "LICENSE 1"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_ctx", 4096.0),
        ("num_ctx", True),
        ("num_ctx", "4096"),
        ("num_ctx", 2**31),
        ("temperature", "0.2"),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e39),
        ("temperature", False),
        ("use_mmap", 1),
        ("stop", "###"),
        ("stop", (1,)),
        ("stop", ("",)),
        ("stop", ("a", "a")),
        ("stop", ("### Nota", "###")),
        ("typical_p", 0.5),
        ("mirostat", 1),
        ("seed\nADAPTER x", 1),
    ],
)
def test_a_parameter_that_ollama_would_refuse_or_ignore_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ModelfileError, match=re.escape(name.split("\n", maxsplit=1)[0])):
        render(replace(PLAIN, parameters={name: value}))


# Styles.


def test_the_shipped_styles_are_these() -> None:
    assert style_names() == STYLES
    assert [Style.load(name).name for name in STYLES] == list(STYLES)


def test_an_unknown_style_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'nota-clinica'\?") as caught:
        Style.load("nota-clinca")
    assert all(name in str(caught.value) for name in STYLES)


@pytest.mark.parametrize("name", STYLES)
def test_a_copied_style_folder_is_the_same_style(name: str, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "Modelfiles" / name, tmp_path / "mine")
    assert Style.load(tmp_path / "mine") == Style.load(str(tmp_path / "mine")) == Style.load(name)


def test_a_folder_without_style_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"style\.toml"):
        Style.load(tmp_path)


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """Return a copy of a shipped style, to be damaged."""
    return Path(shutil.copytree(REPOSITORY / "Modelfiles" / "nota-clinica", tmp_path / "style"))


def test_all_problems_of_a_style_are_named_at_once(style: Path) -> None:
    (style / "style.toml").write_text(
        'name = "Nota Clinica"\ntitle = ""\nauthor = "x"\nstop = []\n[parameters]\n'
    )
    (style / "template.gotmpl").write_text("<s>{{ .Prompt }}")
    (style / "system.txt").write_bytes(b"10\xc2\xa0mg\r\n")
    with pytest.raises(RecipeError) as caught:
        Style.load(style)
    problems = "\n".join(caught.value.problems)
    for part in ("name:", "title:", "author:", "description:", "'<s>'", ".Response", "U+00A0"):
        assert part in problems


@pytest.mark.parametrize(
    ("toml", "problem"),
    [
        ("name = ", "not valid TOML"),
        ('stop = ["a"]\n[parameters]\nnum_ctx = "x"\nfoo = 1', "num_ctx: 'x' is not a whole"),
        ('stop = ["a"]\n[parameters]\nfoo = 1', "there is no parameter 'foo'"),
        ('stop = ["a"]\n[parameters]\nstop = ["b"]', "parameters.stop"),
        ('stop = ["### A", "###"]\n[parameters]', "'### A' can never act"),
    ],
)
def test_a_wrong_table_is_refused(style: Path, toml: str, problem: str) -> None:
    head = 'name = "a"\ntitle = "a"\ndescription = "a"\n'
    (style / "style.toml").write_text(toml if "[" not in toml else head + toml)
    with pytest.raises(RecipeError, match=re.escape(problem)):
        Style.load(style)


@pytest.mark.parametrize(
    "template",
    [
        '{{ if eq .Prompt "x" }}y{{ end }}{{ .Prompt }}{{ .Response }}',
        "{{ range .Messages }}{{ .Content }}{{ end }}{{ .Prompt }}{{ .Response }}",
        '{{ .Prompt }}{{ printf "%s" "z" }}{{ .Response }}',
        '{{ "a}}b" }}{{ .Prompt }}{{ .Response }}',
        "{{/* note */}}{{ .Prompt }}{{ .Response }}",
        "{{ .Prompt }}{{ if .System }}{{ .Response }}{{ end }}",
        "{{ .Prompt }}{{ .Response }}{{ .Response }}",
        "{{ .Prompt }}",
        "{{ .Response }}",
        "{{ if .System }}{{ .Prompt }}{{ .Response }}",
        "{{ .Prompt }}{{ .Response }}{{ end }}",
        "{{ .Prompt }}{{ .Response }}{{ if .System }}",
        "{{ .Prompt }}{{ .Response }}{{ end }}{{ if .System }}",
        "{{ .Prompt }}{{ .Response }}{{ .System",
        "{{ .Prompt }}{{ .Response }}</s>",
    ],
)
def test_a_template_outside_the_grammar_is_refused(style: Path, template: str) -> None:
    (style / "template.gotmpl").write_text(template)
    with pytest.raises(RecipeError, match=r"template\.gotmpl"):
        Style.load(style)


def test_trim_marks_belong_to_the_grammar(style: Path) -> None:
    template = "{{- if .System -}}\n{{.System}}\n{{- end }} {{ .Prompt }} {{ .Response -}}\n"
    (style / "template.gotmpl").write_text(template)
    assert Style.load(style).template == template


@pytest.mark.parametrize("name", ["template.gotmpl", "system.txt"])
@pytest.mark.parametrize("data", [b"", b"\xff", b"{{ .Prompt }}\r\n{{ .Response }}"])
def test_an_unfit_text_file_is_refused(style: Path, name: str, data: bytes) -> None:
    (style / name).write_bytes(data)
    with pytest.raises(RecipeError, match=re.escape(name)):
        Style.load(style)


def test_only_the_system_text_may_be_absent(style: Path) -> None:
    (style / "system.txt").unlink()
    assert Style.load(style).system == ""
    (style / "template.gotmpl").unlink()
    with pytest.raises(RecipeError, match=r"template\.gotmpl"):
        Style.load(style)


def test_one_line_break_at_the_end_of_the_system_file_does_not_count(style: Path) -> None:
    (style / "system.txt").write_text("a\n\n")
    assert Style.load(style).system == "a\n"


def test_given_parameters_replace_those_of_the_style() -> None:
    style = Style.load("nota-clinica")
    changed = style.modelfile("./a.gguf", parameters={"num_ctx": 2048, "stop": ("x",)})
    assert changed.parameters == {**style.parameters, "num_ctx": 2048, "stop": ("x",)}


def test_the_digest_of_a_template_is_that_of_its_file() -> None:
    data = (REPOSITORY / "Modelfiles/nota-clinica/template.gotmpl").read_bytes()
    assert Style.load("nota-clinica").template_sha256 == hashlib.sha256(data).hexdigest()
    assert template_sha256("á") == hashlib.sha256("á".encode()).hexdigest()


@pytest.mark.parametrize("name", FRAMED)
def test_the_system_text_sets_the_limits(name: str) -> None:
    system = Style.load(name).system
    for words in ("Não invente", "não é um dispositivo médico", "profissional de saúde habilitado"):
        assert words in system
    assert "anvisa" not in system.lower()


@pytest.mark.parametrize("name", FRAMED)
def test_the_headings_of_the_frame_are_the_stops(name: str) -> None:
    style = Style.load(name)
    assert tuple(re.findall(r"^### .+$", re.sub(r"\{\{.*?\}\}", "", style.template), re.M)) == (
        style.stop
    )


# What Ollama makes of the styles, with Go's own text/template.


def chats(system: str) -> dict[str, Chat]:
    """Return the ways a model is asked; /api/generate sends a prompt as a user's message."""
    return {
        "prompt": [("user", FIRST)],
        "system": [("system", system), ("user", FIRST)],
        "chat": [
            ("system", system),
            ("user", FIRST),
            ("assistant", ANSWER),
            ("user", SECOND),
        ],
        "prefill": [("user", FIRST), ("assistant", ANSWER)],
        "late": [("user", FIRST), ("assistant", ANSWER), ("system", system), ("user", SECOND)],
        "joined": [("user", FIRST), ("user", SECOND)],
    }


GOLDEN = {
    "prompt": f"### Q\n{FIRST}\n\n### A\n",
    "system": f"SYS\n\n### Q\n{FIRST}\n\n### A\n",
    "chat": f"SYS\n\n### Q\n{FIRST}\n\n### A\n{ANSWER}\n\n### Q\n{SECOND}\n\n### A\n",
    "prefill": f"### Q\n{FIRST}\n\n### A\n{ANSWER}",
    "late": f"### Q\n{FIRST}\n\n### A\n{ANSWER}\n\nSYS\n\n### Q\n{SECOND}\n\n### A\n",
    "joined": f"### Q\n{FIRST}\n\n{SECOND}\n\n### A\n",
}
GOLDEN_RAW = {
    "prompt": FIRST,
    "system": FIRST,
    "chat": f"{FIRST}{ANSWER}\n{SECOND}",
    "prefill": f"{FIRST}{ANSWER}",
    "late": f"{FIRST}{ANSWER}\n{SECOND}",
    "joined": f"{FIRST}\n\n{SECOND}",
}


@pytest.mark.golang
@pytest.mark.parametrize("use", GOLDEN)
@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("nota-clinica", "Dados do paciente", "Nota clínica"),
        ("sumario-alta", "Dados da internação", "Sumário de alta"),
    ],
)
def test_a_framed_style_renders_to_this(
    name: str, question: str, answer: str, use: str, ollama: Renderer
) -> None:
    style = Style.load(name)
    expected = GOLDEN[use].replace("### Q", f"### {question}").replace("### A", f"### {answer}")
    expected = expected.replace("SYS", style.system)
    assert ollama(style.template, *chats(style.system)[use]) == expected


@pytest.mark.golang
@pytest.mark.parametrize("use", GOLDEN_RAW)
def test_the_continuation_style_renders_to_the_text_itself(use: str, ollama: Renderer) -> None:
    style = Style.load("continuacao")
    assert ollama(style.template, *chats("Instrução.")[use]) == GOLDEN_RAW[use]


@pytest.mark.golang
def test_the_continuation_style_adds_no_byte_to_a_prompt(ollama: Renderer) -> None:
    text = "  \n\tHDA: dor {{ .System }} e “febre”\u00a0há 2 d \n\n"
    assert ollama(Style.load("continuacao").template, ("user", text)) == text


@pytest.mark.golang
def test_the_program_treats_templates_as_ollama_does(ollama: Renderer) -> None:
    chat = (("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V"))
    assert ollama("{{ .Prompt }}", *chat) == "UAV", "no .Response: it is appended"
    assert ollama("[{{ .Prompt }}|{{ .Response }}]", *chat) == "[U|A][V|"
    with_messages = "{{ .System }}{{ range .Messages }}<{{ .Role }}:{{ .Content }}>{{ end }}"
    assert ollama(with_messages, *chat) == "S<system:S><user:U><assistant:A><user:V>"
    assert ollama("{{ .Prompt }}_{{ .Suffix }}", prompt="a", suffix="b") == "a_b"


@pytest.mark.golang
@pytest.mark.parametrize("name", STYLES)
def test_what_a_user_writes_changes_nothing_but_itself(name: str, ollama: Renderer) -> None:
    template = Style.load(name).template
    plain = ollama(template, ("system", "S"), ("user", "MARK"))
    for text in ("senha", "{{ .System }}", "</s>", "### Nota clínica", FIRST, "a\nb"):
        assert ollama(template, ("system", "S"), ("user", text)) == plain.replace("MARK", text)


@pytest.mark.golang
@pytest.mark.parametrize("name", STYLES)
def test_no_stop_stands_at_the_end_of_a_prompt(name: str, ollama: Renderer) -> None:
    style = Style.load(name)
    for chat in chats(style.system).values():
        assert not ollama(style.template, *chat).endswith(style.stop or ("\0",))


@pytest.mark.golang
@pytest.mark.parametrize("name", FRAMED)
def test_a_model_that_goes_on_with_the_frame_meets_a_stop(name: str, ollama: Renderer) -> None:
    style = Style.load(name)
    both = ollama(style.template, *chats(style.system)["chat"])
    after = both.partition(ANSWER)[2]
    assert after.strip().startswith(style.stop)


@pytest.mark.golang
def test_no_character_that_is_let_through_is_unprintable_for_go(program: Path) -> None:
    lines = subprocess.check_output([program, "printable"], text=True).splitlines()
    printable = {"\t", "\n"}
    for start, stop in (map(int, line.split()) for line in lines):
        printable.update(map(chr, range(start, stop)))
    through = {char for char in map(chr, range(0x110000)) if survives(char)}
    assert sorted(through - printable) == []


# Tokens: exactly one BOS.


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> llama_cpp.Llama:
    """Return llama.cpp with a small LLaMA-like vocabulary that asks for a BOS."""
    path = tmp_path_factory.mktemp("vocab") / "vocab.gguf"
    write_vocabulary(path, sentencepiece.SentencePieceProcessor(model_proto=trained()))
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def trained() -> bytes:
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([FIRST, ANSWER, SECOND] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        minloglevel=2,
    )
    return model.getvalue()


def write_vocabulary(path: Path, model: Any) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    ids = range(model.get_piece_size())
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types([token_type(model, i) for i in ids])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def token_type(model: Any, i: int) -> int:
    types = gguf.TokenType
    if model.is_unknown(i):
        return int(types.UNKNOWN)
    if model.is_control(i):
        return int(types.CONTROL)
    return int(types.BYTE if model.is_byte(i) else types.NORMAL)


def tokens(tokenizer: llama_cpp.Llama, text: str) -> list[int]:
    # Like Ollama: the vocabulary decides on the BOS, and <s> in a text is the control token.
    return list(tokenizer.tokenize(text.encode(), add_bos=True, special=True))


@pytest.mark.golang
@pytest.mark.parametrize("name", STYLES)
def test_every_prompt_has_exactly_one_bos_and_no_eos(
    name: str, ollama: Renderer, tokenizer: llama_cpp.Llama
) -> None:
    style = Style.load(name)
    for chat in chats(style.system).values():
        text = ollama(style.template, *chat)
        assert "<s>" not in text
        assert "</s>" not in text
        found = tokens(tokenizer, text)
        assert found[0] == 1
        assert found.count(1) == 1
        assert found.count(2) == 0


def test_a_bos_in_a_text_would_be_a_second_one(tokenizer: llama_cpp.Llama) -> None:
    assert tokens(tokenizer, "<s>dor").count(1) == 2
    assert tokens(tokenizer, "dor</s>").count(2) == 1


# The page for users.

PAGE = REPOSITORY / "docs" / "modelfiles.md"
BLOCK = re.compile(r"<!-- rendered: (\S+) (\S+) -->\n```text\n(.*?)\n```\n", re.DOTALL)


@pytest.mark.golang
def test_the_page_shows_what_is_really_rendered(ollama: Renderer) -> None:
    blocks = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    assert {name for name, _, _ in blocks} == set(STYLES)
    for name, use, text in blocks:
        style = Style.load(name)
        assert ollama(style.template, *chats(style.system)[use]).rstrip("\n") == text


def test_the_page_lists_every_style_and_parameter() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in STYLES:
        assert f"| `{name}` | {Style.load(name).description} |" in page
    assert f"Parameters: {', '.join(f'`{name}`' for name in PARAMETERS)}." in page


# Names.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("clinical-br", ModelName("clinical-br")),
        ("clinical-br:7b-q4_k_m", ModelName("clinical-br", "7b-q4_k_m")),
        ("me/clinical-br:Q4_K_M", ModelName("clinical-br", "Q4_K_M", "me")),
        ("localhost:5000/me/m", ModelName("m", None, "me", "localhost:5000")),
        ("h.example/me/m.1:latest", ModelName("m.1", "latest", "me", "h.example")),
    ],
)
def test_a_name_prints_as_it_was_written(text: str, name: ModelName) -> None:
    assert ModelName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a:",
        ":a",
        "a:b:c",
        "-a",
        ".a",
        "a b",
        "ação",
        "a\n",
        "a/",
        "/a",
        "a//b",
        "x.y/a",
        "a/b/c/d",
        "https://h/a/b",
        "a" * 81,
        "a:" + "b" * 81,
        "../../etc",
    ],
)
def test_a_name_that_ollama_refuses_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a model name"):
        ModelName.parse(text)


def test_the_second_reader_refuses_what_ollama_refuses() -> None:
    for text in ("", "SYSTEM a\n", "FROM", "FRÖM x", 'FROM x\nSYSTEM """a', "FROM x\nMESSAGE a b"):
        with pytest.raises(ParseError):
            parse(text)
