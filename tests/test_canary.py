"""Texts of a user leave no trace: not in the pack, its reports, caches, logs or what is said."""

from __future__ import annotations

import base64
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from medllm_pack.parity.original import Sources
from tests import pico
from tests.test_build import run, variant
from tests.test_parity import reseal, token_twice, wrong_rope_base
from tests.test_worker import children, processor_seconds, wait_for

CANARY = "Paciente Zulmira Quixabeira, prontuário 7734599210, nega alergias a canários."
WORDS = ("Zulmira", "Quixabeira", "prontuário 7734599210", "alergias a canários")
# A test that runs in the background of a shell was told to ignore the signal, and so would this.
PROGRAM = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)

written = 0

def stop_at_second(event, arguments):  # file without a name that the reference writes
    global written
    if event == "open" and str(arguments[0]).startswith("/proc/self/fd/"):
        written += arguments[1] == "w"
        if written == 2:
            written += 1
            os.kill(os.getpid(), signal.SIGSTOP)

if "STOP" in os.environ:
    sys.addaudithook(stop_at_second)
from medllm_pack.cli.app import main
main()
"""
_IDS = 6  # in a row: in another text by chance once in 320^6


def forms_of_text(text: str) -> Iterator[bytes]:
    """Yield a text as it could stand in a file."""
    for spelled in {text, unicodedata.normalize("NFD", text), text.upper()}:
        for coding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "latin-1"):
            data = spelled.encode(coding, "ignore")
            yield data
            yield data.hex().encode()
            yield data.hex().upper().encode()
            yield data.hex(" ").encode()
            # Base64 at each alignment, without the characters that hold bits of a neighbour.
            for i in range(3):
                whole = base64.b64encode(bytes(i) + data)
                inner = whole[-(-i * 8 // 6) : (i + len(data)) * 8 // 6]
                yield inner
                yield inner.translate(bytes.maketrans(b"+/", b"-_"))
        yield json.dumps(spelled)[1:-1].encode()  # with \u escapes


def forms_of_ids(ids: list[int]) -> Iterator[bytes]:
    """Yield a few ids in a row as they could stand in a file."""
    for i in range(len(ids) - _IDS + 1):
        some = ids[i : i + _IDS]
        for kind in ("<u2", "<i4", "<i8", ">u2", ">i4", ">i8"):
            yield np.array(some, dtype=kind).tobytes()
        for between in (", ", ",", " ", "\n"):
            yield between.join(map(str, some)).encode()


def traces(data: bytes, tokenizer: Path) -> list[bytes]:
    """Return the forms of the canary that stand in some bytes."""
    pieces = SentencePieceProcessor(model_file=str(tokenizer))
    forms = {form for word in WORDS for form in forms_of_text(word)}
    forms |= set(forms_of_ids(pieces.encode(CANARY)[3:-3]))  # ends depend on what is beside them
    plain = re.sub(rb"[\s,]+", b" ", data)  # lists of numbers, however they were laid out
    return [form for form in forms if form in data or form in plain]


def everything(folder: Path) -> bytes:
    return b"\n".join(
        str(path).encode() + b"\n" + path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("own.")
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Sources:
    folder = tmp_path_factory.mktemp("inputs")
    base = pico.write_model(folder / "base", tokenizer=tokenizer)
    return Sources(base=str(base), adapter=str(pico.write_adapter(folder / "adapter")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, inputs: Sources) -> Path:
    folder = tmp_path_factory.mktemp("built")
    run(
        folder / "pack", quants=["f16"], base=Path(inputs.base or ""),
        adapter=Path(inputs.adapter or ""),
    )  # fmt: skip
    return folder / "pack"


class Place:
    """A folder that is all that a run of the command has: home, temporary files and caches."""

    def __init__(self, folder: Path, built: Path, inputs: Sources) -> None:
        self.folder, self.inputs = folder, inputs
        self.pack = Path(shutil.copytree(built, folder / "pack"))
        self.temporary = folder / "temporary"
        for name in ("home", "temporary", "work"):
            (folder / name).mkdir()

    def start(self, texts: Path, *more: str, **environment: str) -> subprocess.Popen[bytes]:
        kept = {
            name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ
        }
        places = {"HOME": str(self.folder / "home"), "TMPDIR": str(self.temporary)}
        root = str(Path(__file__).parent.parent)
        return subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "parity", str(self.pack), "--threads=1",
             f"--base={self.inputs.base}", f"--adapter={self.inputs.adapter}", "--texts",
             str(texts), *more],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.folder / "work",
            env=kept | places | {"PYTHONPATH": root} | environment,
        )  # fmt: skip

    def left_behind(self) -> list[Path]:
        """Return what is left where the command keeps nothing."""
        places = [self.folder / name for name in ("temporary", "home", "work")]
        return [path for place in places for path in place.rglob("*")]

    def look(self, said: bytes) -> list[bytes]:
        """Return the traces in all files and in what was said."""
        found = said + everything(self.folder)
        return traces(found, Path(self.inputs.base or "") / "tokenizer.model")


@pytest.fixture
def place(tmp_path: Path, built: Path, inputs: Sources) -> Place:
    (tmp_path / "place").mkdir()
    return Place(tmp_path / "place", built, inputs)


def nothing(pack: Path, inputs: Sources) -> None:
    """A sound pack."""


@pytest.mark.parametrize(
    ("fault", "kind", "more", "code"),
    [
        (nothing, "jsonl", ("--json",), 0),
        (wrong_rope_base, "txt", ("-v",), 3),  # failures say more, tracebacks most
        (token_twice, "txt", ("-v",), 3),  # llama.cpp aborts
    ],
)
def test_users_texts_appear_nowhere(
    place: Place,
    fault: Callable[[Path, Sources], None],
    kind: str,
    more: tuple[str, ...],
    code: int,
) -> None:
    fault(place.pack, place.inputs)
    reseal(place.pack)
    texts = write_texts(place.folder, kind)
    debug = {"MEDLLM_DEBUG": "1"} if fault is wrong_rope_base else {}
    with place.start(texts, *more, **debug) as process:
        out, err = process.communicate()
    assert process.returncode == code, err
    assert (b"Traceback" in err) is bool(debug)
    assert place.left_behind() == []
    assert place.look(out + err) == []
    texts_of = json.loads((place.pack / "parity.json").read_text(encoding="utf-8"))["texts"]
    assert texts_of == {"name": "user", "count": 2, "sha256": None}
    assert (place.pack / "parity.html").exists()


def write_texts(folder: Path, kind: str, *, times: int = 1) -> Path:
    notes = [" ".join([CANARY] * times), " ".join([CANARY] * times + ["De novo."])]
    lines = [json.dumps({"text": note}) for note in notes] if kind == "jsonl" else notes
    path = folder / f"own.{kind}"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL), (signal.SIGABRT, -signal.SIGABRT)],
)
def test_check_that_ends_while_the_reference_computes_leaves_no_trace_either(
    place: Place, how: signal.Signals, code: int, dumps_allowed: None
) -> None:
    texts = write_texts(place.folder, "txt")
    with place.start(texts, "-v", STOP="1") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(how)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate()
    assert process.returncode == code
    assert place.left_behind() == []
    assert place.look(out + err) == []
    assert not (place.pack / "parity.json").exists()


def test_check_that_is_killed_while_llama_cpp_computes_leaves_no_trace_either(place: Place) -> None:
    texts = write_texts(place.folder, "txt", times=100)
    with place.start(texts, "-v", "--ctx=4096") as process:
        # The jobs before the one that writes logits take a third of this.
        while not (workers := list(workers_at_work(process.pid, seconds=0.8))):
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
        out, err = process.communicate()
    wait_for(lambda: not Path(f"/proc/{workers[0]}").exists())
    assert process.returncode == -signal.SIGKILL
    assert place.left_behind() == []
    assert place.look(out + err) == []
    assert not (place.pack / "parity.json").exists()


@pytest.fixture
def dumps_allowed() -> Iterator[None]:
    """Let what is started here dump its memory where it ends, as far as this machine allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_CORE, (soft, hard))


def workers_at_work(parent: int, *, seconds: float) -> Iterator[int]:
    """Yield workers of a process that have computed for some time."""
    for pid in children(parent):
        with suppress(FileNotFoundError):
            if processor_seconds(pid) > seconds:
                yield pid


def test_process_that_must_not_dump_does_not(tmp_path: Path, dumps_allowed: None) -> None:
    program = "import os; from medllm_pack.parity.process import *; {}; os.abort()"
    root = str(Path(__file__).parent.parent)
    dumped = []
    for first in ("forbid_dumps()", "pass"):
        with subprocess.Popen(
            [sys.executable, "-c", program.format(first)], cwd=tmp_path, env={"PYTHONPATH": root}
        ) as process:
            _, status = os.waitpid(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == -signal.SIGABRT
        dumped.append(os.WCOREDUMP(status))
    if dumped == [False, False]:
        pytest.skip("this machine dumps the memory of no process")
    assert dumped == [False, True]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_texts_that_cannot_be_read_are_not_quoted(place: Place, name: str) -> None:
    path = place.folder / f"own.{name}"
    path.write_bytes(f'{{"note": "{CANARY}"}}\n'.encode() if "json" in name else b"\xff" * 9)
    if name == "a.txt":
        path.write_bytes(CANARY.encode("utf-16"))
    with place.start(path, MEDLLM_DEBUG="1") as process:
        out, err = process.communicate()
    assert process.returncode == 1
    assert place.look(out + err) == []


# --- that a trace would be seen


@pytest.mark.parametrize(
    "leak",
    [
        lambda text: text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-be"),
        lambda text: text.encode("latin-1"),
        lambda text: unicodedata.normalize("NFD", text).encode(),
        lambda text: json.dumps({"note": text}).encode(),
        lambda text: base64.b64encode(text.encode()),
        lambda text: base64.b64encode(b"x" + text.encode()),
        lambda text: base64.b64encode(b"xy" + text.encode()),
        lambda text: base64.b64encode(text.encode("utf-16-le")),
        lambda text: base64.urlsafe_b64encode(text.encode("utf-16-be")),
        lambda text: text.encode().hex().encode(),
        lambda text: text.encode("utf-16-be").hex().upper().encode(),
    ],
)
def test_canary_would_be_seen_as_text(inputs: Sources, leak: Callable[[str], bytes]) -> None:
    model = Path(inputs.base or "") / "tokenizer.model"
    assert traces(b"\x00\x01" + leak(f"nota: {CANARY} Fim") + b"\x02", model)


@pytest.mark.parametrize("kind", ["<i4", "<i8", ">i4", ">i8", "<u2", "json", "indented", "lines"])
def test_canary_would_be_seen_as_token_ids(inputs: Sources, kind: str) -> None:
    model = Path(inputs.base or "") / "tokenizer.model"
    ids = [1, *SentencePieceProcessor(model_file=str(model)).encode(f"{CANARY} Fim")]
    texts = {
        "json": json.dumps({"ids": ids}), "indented": json.dumps(ids, indent=2),
        "lines": "\n".join(map(str, ids)),
    }  # fmt: skip
    data = texts[kind].encode() if kind in texts else np.array(ids, dtype=kind).tobytes()
    assert traces(b"abc" + data, model)


def test_sound_pack_holds_nothing_like_the_canary(built: Path, inputs: Sources) -> None:
    assert traces(everything(built), Path(inputs.base or "") / "tokenizer.model") == []
    assert variant(built, "F16").exists()
