"""A variant of a pack as Ollama's image: compared with Go's own encoder and Ollama's structures."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm_pack.digests import Digest
from medllm_pack.errors import MedllmError, ModelfileError, SourceError, UsageError
from medllm_pack.ollama import gojson
from medllm_pack.ollama.create import Creation, human_number
from medllm_pack.ollama.image import Blob, Image
from medllm_pack.ollama.modelfile import Modelfile, render
from medllm_pack.pack import sums
from medllm_pack.publish import papers
from medllm_pack.publish.make import make_release
from medllm_pack.publish.release import Release
from tests import golang, ollama_parser, packs
from tests.hub_client import Recorded

SETTINGS = settings(deadline=None, max_examples=60)  # each example starts a program
Create = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def create(tmp_path_factory: pytest.TempPathFactory) -> Create:
    """Return a function that runs tests/ollamacreate."""
    built = golang.built("ollamacreate", tmp_path_factory.mktemp("go"))

    def run(**request: Any) -> dict[str, Any]:
        data = json.dumps(request).encode()
        answer = json.loads(
            subprocess.run([built], input=data, capture_output=True, check=True).stdout
        )
        return {
            "blobs": [base64.b64decode(blob) for blob in answer["blobs"]],
            "manifest": base64.b64decode(answer["manifest"]),
        }

    return run


def commands(text: str) -> list[tuple[str, str]]:
    return [(command.name, command.args) for command in ollama_parser.parse(text)]


def data(blob: Blob) -> bytes:
    with blob.open() as file:
        return file.read()


def small_blobs(image: Image) -> list[bytes]:
    return [data(blob) for blob in (*image.layers[1:], image.config)]


def expected(create: Create, folder: Path, quant: str) -> dict[str, Any]:
    """Return what Ollama makes of a variant, with gguf-py and hashlib as readers."""
    document = json.loads((folder / "pack.json").read_text(encoding="utf-8"))
    entry = next(v for v in document["variants"] if v["quant"] == quant)
    weights = folder / entry["file"]
    reader = GGUFReader(weights)
    return create(
        file=str(weights),
        digest="sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest(),
        size=weights.stat().st_size,
        family=reader.fields["general.architecture"].contents(),
        fileType=quant.upper(),
        parameters=int(sum(tensor.n_elements for tensor in reader.tensors)),
        commands=commands((folder / entry["modelfile"]).read_text(encoding="utf-8")),
    )


@pytest.mark.golang
def test_images_are_what_ollama_create_writes(built_pack: Path, create: Create) -> None:
    release = make_release(built_pack)
    assert [tagged.quant for tagged in release.images] == ["f16", "q4_k_m"]
    for tagged in release.images:
        wanted = expected(create, built_pack, tagged.quant)
        assert small_blobs(tagged.image) == wanted["blobs"]
        assert tagged.image.manifest == wanted["manifest"]


@pytest.mark.golang
def test_an_image_without_system_text_has_no_such_layer(tmp_path: Path, create: Create) -> None:
    folder = packs.build_pack(tmp_path / "p", quants=("f16",), template="continuacao")
    (tagged,) = make_release(folder).images
    assert tagged.image.manifest == expected(create, folder, "f16")["manifest"]
    kinds = [layer.media_type.rpartition(".")[2] for layer in tagged.image.layers]
    assert kinds == ["model", "template", "license", "params"]


LARGE = 2.0**127
FLOATS = (
    st.floats(-LARGE, LARGE, width=32, allow_subnormal=False)
    | st.floats(1e-12, 10)
    | st.sampled_from((0.1, 1e-7))
)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "num_ctx": st.integers(-(2**31) + 1, 2**31 - 1),
        "temperature": FLOATS,
        "top_p": FLOATS,
        "use_mmap": st.booleans(),
        "stop": st.lists(
            st.text(st.sampled_from("<>&'\"\\/ aé\u0301😀\n\t#"), min_size=3, max_size=6)
            .filter(lambda text: '"""' not in text),
            min_size=1, max_size=1,
        ),
    },
)  # fmt: skip


@pytest.mark.golang
def test_parameters_are_stored_as_ollama_stores_them(create: Create) -> None:
    @SETTINGS
    @given(PARAMETERS)
    def check(parameters: dict[str, Any]) -> None:
        text = render(Modelfile("./m.gguf", "{{ .Prompt }}", parameters=parameters))
        made = Creation.parse(text, name="Modelfile")
        wanted = create(size=1, commands=commands(text))["blobs"][1:-1]
        assert [gojson.encode(made.parameters)] * bool(parameters) == wanted

    check()


@pytest.mark.golang
@SETTINGS
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\b\f")))
def test_strings_are_written_as_go_writes_them(text: str, create: Create) -> None:
    template = create(commands=[["template", "t"], ["stop", text]])["blobs"][1]
    assert gojson.encode({"stop": [text]}) == template


@pytest.mark.golang
@SETTINGS
@given(n=st.integers(0, 2 * 10**12) | st.sampled_from((6738415616, 7 * 10**9, 999_999_999)))
def test_numbers_of_weights_are_shown_as_ollama_shows_them(n: int, create: Create) -> None:
    config = json.loads(create(parameters=n)["blobs"][-1])
    assert config["model_type"] == human_number(n)


def test_the_seven_billion_model_is_shown_as_6_7b() -> None:
    assert human_number(6_738_415_616) == "6.7B"


TEXT = st.text(st.sampled_from("aé \n\t{}\"'#<FROM>PARAMETER"), max_size=40).filter(
    lambda text: '"""' not in text
)


@given(template=TEXT.filter(bool), system=TEXT, license_=st.lists(TEXT, max_size=3))
def test_texts_are_those_that_ollama_reads(template: str, system: str, license_: list[str]) -> None:
    text = render(Modelfile("./m.gguf", template, system=system, license=license_))
    made = Creation.parse(text, name="Modelfile")
    read = commands(text)
    assert [made.file] == [args.removeprefix("./") for name, args in read if name == "model"]
    assert [made.template] == [args for name, args in read if name == "template"]
    assert made.system == "".join(args for name, args in read if name == "system")
    assert list(made.license) == [args for name, args in read if name == "license"]


@pytest.mark.parametrize(
    "line",
    ['ADAPTER ./x\n', 'MESSAGE user "x"\n', "FROM /etc/passwd\n", 'SYSTEM "x"\n', "PARAMETER a 1\n",
     "PARAMETER num_ctx x\n", 'PARAMETER num_ctx """1"""\n', "PARAMETER use_mmap 1\n", "x",
     'TEMPLATE """a"""\n', "FROM ./n.gguf\n"],
)  # fmt: skip
def test_a_modelfile_that_was_edited_is_refused(line: str) -> None:
    text = render(Modelfile("./m.gguf", "{{ .Prompt }}"))
    assert Creation.parse(text, name="Modelfile.f16").file == "m.gguf"
    with pytest.raises(ModelfileError, match=r"Modelfile\.f16"):
        Creation.parse(text + line, name="Modelfile.f16")


def test_tags_are_those_of_the_variants_and_one_default(built_pack: Path) -> None:
    tags = [tagged.tags for tagged in make_release(built_pack).images]
    assert tags == [("7b-f16",), ("7b-q4_k_m", "7b")]
    tags = [tagged.tags for tagged in make_release(built_pack, quants=["F16"], tag="v1").images]
    assert tags == [("v1-f16", "v1")]
    assert [t.tags for t in make_release(built_pack, tag="").images][1] == ("q4_k_m", "latest")


def test_papers_are_all_files_but_weights(built_pack: Path) -> None:
    release = make_release(built_pack)
    names = {path.name for path in built_pack.iterdir() if path.suffix != ".gguf"}
    for tagged in release.images:
        (attached,) = tagged.attached
        found = papers.names_of(attached.manifest)
        assert set(found) == names
        for name, digest in found.items():
            assert digest.hex == hashlib.sha256((built_pack / name).read_bytes()).hexdigest()
        subject = json.loads(attached.manifest)["subject"]
        assert subject == {
            "mediaType": tagged.image.media_type,
            "digest": "sha256:" + hashlib.sha256(tagged.image.manifest).hexdigest(),
            "size": len(tagged.image.manifest),
        }


def test_weights_keep_their_digest(built_pack: Path) -> None:
    lines = (built_pack / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    for tagged in make_release(built_pack).images:
        weights = tagged.image.layers[0]
        assert isinstance(weights.source, Path)
        assert weights.digest.hex == sums[weights.source.name]


def test_a_release_names_each_blob_once(built_pack: Path) -> None:
    blobs = list(make_release(built_pack).blobs)
    assert len({blob.digest for blob in blobs}) == len(blobs)
    for blob in blobs:
        assert Digest.of(data(blob)) == blob.digest
        assert len(data(blob)) == blob.size


def copy(pack: Path, to: Path) -> Path:
    return Path(shutil.copytree(pack, to))


def change_paper(folder: Path) -> None:
    (folder / "README.md").write_text("x")


def change_weights(folder: Path) -> None:
    path = next(folder.glob("*F16.gguf"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def shorten_weights(folder: Path) -> None:
    path = next(folder.glob("*F16.gguf"))
    os.truncate(path, path.stat().st_size - 1)


def remove_weights(folder: Path) -> None:
    next(folder.glob("*F16.gguf")).unlink()


def remove_paper(folder: Path) -> None:
    (folder / "LICENSE").unlink()


def change_modelfile(folder: Path) -> None:
    path = folder / "Modelfile.f16"
    path.write_text(path.read_text() + "PARAMETER seed 1\n")


@pytest.mark.parametrize(
    "change",
    [change_paper, change_weights, shorten_weights, remove_weights, remove_paper, change_modelfile],
)
def test_a_pack_that_was_changed_is_not_released(
    change: Callable[[Path], None], built_pack: Path, tmp_path: Path
) -> None:
    folder = copy(built_pack, tmp_path / "p")
    change(folder)
    with pytest.raises(MedllmError):
        make_release(folder)


def test_weights_that_were_digested_are_not_read_again(built_pack: Path, tmp_path: Path) -> None:
    folder, report = copy(built_pack, tmp_path / "p"), Recorded()
    before = make_release(folder, report=report)
    assert {name for name, _ in report.steps} == {f"checking {p.name}" for p in weights(folder)}
    report.steps.clear()
    assert digests(make_release(folder, report=report)) == digests(before)
    assert report.steps == []
    moved = folder.rename(tmp_path / "q")
    make_release(moved, quants=["f16"], report=report)
    assert len(report.steps) == 1  # another place: read once more


def test_a_time_that_was_set_back_hides_nothing(built_pack: Path, tmp_path: Path) -> None:
    folder = copy(built_pack, tmp_path / "p")
    make_release(folder)
    path = next(folder.glob("*F16.gguf"))
    status = path.stat()
    change_weights(folder)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns
    with pytest.raises(SourceError, match="is not what pack.json says"):
        make_release(folder)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def digests(release: Release) -> list[Digest]:
    return [tagged.image.digest for tagged in release.images]


def test_a_variant_that_is_not_in_the_pack_is_named(built_pack: Path) -> None:
    with pytest.raises(UsageError, match=r"'q8_0'; it has f16, q4_k_m"):
        make_release(built_pack, quants=["q8_0"])


HOSTILE = (
    "", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "C:", "C:x", "\\\\host\\x", "a\0b", "a\n",
    "\nx", "a\x1b[31m", "\u202egpj", "é", "\u0661", "a b", " a", "a ", "~", "~root", "$HOME", "-rf",
    "--help", "*", "?", "a:b", "a|b", "a;b", "`x`", "$(x)", ".hidden", ".lock", "...", "a.", "CON",
    "con", "nul.txt", "COM1", "lpt9.md", "aux", "PRN.json", "x" * 200, "a\t", "a\r", "\ufeffa",
    "a\u200b", "%2e%2e", "..%2f", "a%00", "\U0001f600", "a\u0000", "./a", "a/", "a/../b", "//", "'",
    '"', "<a>", "a&b",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_no_hostile_name_becomes_a_file(name: str) -> None:
    with pytest.raises(SourceError):
        sums.checked_name(name, of="a test")
    layer = {"annotations": {papers.TITLE: name}, "digest": "sha256:" + "0" * 64}
    with pytest.raises(SourceError):
        papers.names_of(json.dumps({"layers": [layer]}).encode())
    with pytest.raises(SourceError):
        sums.parse_sums(f"{'0' * 64}  {name}\n".encode("utf-8", "surrogatepass"), of="sums")


ZEROS, ONES = "0" * 64, "1" * 64


@pytest.mark.parametrize(
    "text",
    ["x\n", f"{ZEROS} a\n", f"{ZEROS}  a", f"{'A' * 64}  a\n", f"\n{ZEROS}  a\n",
     f"{ZEROS}  a\n{ONES}  a\n", f"{ZEROS[1:]}  a\n", f"{ZEROS}  a\r\n", f"{ZEROS} *a\n"],
)  # fmt: skip
def test_sums_are_read_strictly(text: str) -> None:
    with pytest.raises(SourceError):
        sums.parse_sums(text.encode(), of="sums")


def test_titles_that_differ_in_case_only_are_refused() -> None:
    layers = [
        {"annotations": {papers.TITLE: name}, "digest": "sha256:" + "0" * 64} for name in ("a", "A")
    ]
    with pytest.raises(SourceError, match="twice"):
        papers.names_of(json.dumps({"layers": layers}).encode())
