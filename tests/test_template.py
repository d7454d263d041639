"""Templates and Modelfiles read again: as Go renders them, as they were written."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medllm_pack.errors import ModelfileError
from medllm_pack.ollama.modelfile import Modelfile, render
from medllm_pack.ollama.reading import read_modelfile
from medllm_pack.ollama.style import Style, style_names
from medllm_pack.ollama.template import Message, Template
from tests.conftest import Renderer
from tests.test_modelfile import MODELFILES

CHATS: list[list[Message]] = [
    [("user", "U")],
    [("system", "S"), ("user", "U")],
    [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")],
    [("user", "U"), ("assistant", "A")],
    [("user", "U"), ("system", "S"), ("user", "V")],
    [("system", "S"), ("system", "T"), ("user", "U"), ("user", "V"), ("assistant", " A\n")],
    [("assistant", "A"), ("user", "{{ .System }}")],
    [("user", "U"), ("assistant", "A"), ("system", "S"), ("user", "V"), ("assistant", "B")],
    [("user", "")],
]

TEXTS = st.text(st.sampled_from("ab#{}é \n\t"), max_size=6).filter(
    lambda t: "{{" not in t and "}}" not in t
)
OPENING, CLOSING = st.sampled_from(["{{", "{{ ", "{{- "]), st.sampled_from(["}}", " }}", " -}}"])


def action(word: str) -> st.SearchStrategy[str]:
    return st.tuples(OPENING, CLOSING).map(lambda sides: word.join(sides))


FIELDS = st.sampled_from([".System", ".Prompt"]).flatmap(action)
PARTS = st.lists(TEXTS | FIELDS, max_size=4).map(lambda parts: " ".join(parts))
BRANCHES = st.tuples(
    st.sampled_from(["if .System", "if .Prompt"]).flatmap(action), PARTS, action("end")
).map("".join)
BODIES = st.lists(TEXTS | FIELDS | BRANCHES, max_size=4).map(lambda parts: " ".join(parts))
TEMPLATES = st.tuples(
    BODIES, action(".Prompt"), BODIES, action(".Response"), BODIES
).map(lambda parts: "\n".join(parts))  # fmt: skip


@pytest.mark.golang
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(template=TEMPLATES, chat=st.sampled_from(CHATS))
def test_any_allowed_template_renders_as_go_renders_it(
    ollama: Renderer, template: str, chat: list[Message]
) -> None:
    try:
        parsed = Template.parse(template)
    except ModelfileError:  # braces of neighbouring parts that met
        return
    assert parsed.render(*chat) == ollama(template, *chat)


@pytest.mark.golang
@pytest.mark.parametrize("name", style_names())
def test_shipped_styles_render_as_go_renders_them(ollama: Renderer, name: str) -> None:
    template = Style.load(name).template
    for chat in CHATS:
        assert Template.parse(template).render(*chat) == ollama(template, *chat)


def test_template_is_rendered_once_a_turn_and_cut_after_the_answer() -> None:
    template = Template.parse(
        "{{ if .System }}{{ .System }}\n{{ end }}[{{ .Prompt -}} ] {{- .Response }}."
    )
    chat: list[Message] = [("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")]
    assert template.render(*chat) == "S\n[U]A.[V]"
    assert template.render(*chat, ("assistant", "B")) == "S\n[U]A.[V]B"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ .Prompt }}", "Response"),
        ("{{ range .Messages }}{{ end }}{{ .Prompt }}{{ .Response }}", "not one of the actions"),
        ("{{ if .Prompt }}{{ .Prompt }}{{ .Response }}", "'if' and 'end' do not match"),
        ("{{ .Prompt }}{{ .Response }}{{", "close it"),
    ],
)
def test_other_templates_are_refused(text: str, said: str) -> None:
    with pytest.raises(ModelfileError, match=said):
        Template.parse(text)


@settings(max_examples=200, deadline=None)
@given(value=MODELFILES)
def test_modelfile_that_was_written_is_read_again(value: Modelfile) -> None:
    assert read_modelfile(render(value, name="a/b:c", file="Modelfile.f16")) == value


GOOD = 'FROM ./m.gguf\nTEMPLATE """{{ .Prompt }}{{ .Response }}"""\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "FROM stands in it 0 times"),
        (GOOD + GOOD, "TEMPLATE stands in it 2 times"),
        (GOOD + "ADAPTER ./x\n", "line 3 is not as medllm-pack writes it: 'ADAPTER ./x'"),
        (GOOD + "SYSTEM plain\n", "line 3"),
        (GOOD + "PARAMETER stop <s>\n", "line 3"),
        (GOOD + 'SYSTEM """never closed\n', "line 3"),
        (GOOD + 'SYSTEM """a""" b"""\n', "three quotes"),
        (GOOD + 'SYSTEM """10\u00a0mg"""\n', r"SYSTEM, line 1, column 3: U\+00A0"),
        (GOOD + 'PARAMETER stop """a\u200b"""\n', r"PARAMETER stop, line 1, column 2: U\+200B"),
        (GOOD + "PARAMETER temprature 1\n", "did you mean 'temperature'"),
        (GOOD + "PARAMETER num_ctx viele\n", "num_ctx: 'viele' is not a whole number"),
        (GOOD + "PARAMETER use_mmap True\n", "use_mmap: 'True' is not true or false"),
        (GOOD + "FROM ./m.gguf", "line 3"),
    ],
)  # fmt: skip
def test_other_modelfiles_are_refused_by_their_line(text: str, said: str) -> None:
    with pytest.raises(ModelfileError, match=said):
        read_modelfile(text)
