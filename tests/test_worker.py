"""llama.cpp's worker: what it sees, what it may take, and that any end of it is a finding."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest

from medllm_pack.errors import WorkerError
from medllm_pack.parity import allowance, llamacpp, worker
from medllm_pack.parity.allowance import LOOK_AT_GPU, Allowance, to_compute, to_read
from medllm_pack.parity.jobs import Jobs
from medllm_pack.parity.nameless import Nameless, descriptor
from medllm_pack.parity.report.details import translate
from medllm_pack.parity.runtime import Runtime, _missing
from medllm_pack.quant import ggml
from tests.test_build import pico_file

T = TypeVar("T")
MIB = 1 << 20
CONFIG = SimpleNamespace(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
    head_dim=64, num_hidden_layers=2, vocab_size=320,
)  # fmt: skip
SEQUENCE = list(range(1, 251))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    """A GGUF file of a pico model."""
    return pico_file(tmp_path_factory.mktemp("worker"), tokenizer, "F16")


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def logits(file: Path, given: Allowance, target: Path) -> None:
    worker.call(
        "logits", allowance=given, model=str(file), sequences=[SEQUENCE],
        files=[descriptor(target)], threads=1, gpu_layers=0,
    )  # fmt: skip


def work_long(file: Path, given: Allowance) -> None:
    worker.call(
        "continue", allowance=given, model=str(file), prompts=[SEQUENCE] * 10_000, tokens=2,
        threads=1, gpu_layers=0,
    )  # fmt: skip


@pytest.fixture
def target() -> Iterator[Path]:
    """A file that a worker may write into."""
    with Nameless() as place:
        yield place.new()


# --- what it sees


def test_worker_sees_no_secret_and_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OLLAMA_HOST", "LD_PRELOAD", "PYTHONPATH"):
        monkeypatch.setenv(name, "/secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    program = python("import json, os; print(json.dumps(dict(os.environ)))")
    seen = worker.call("logits", command=program)
    assert set(seen) - {"LC_CTYPE"} <= {
        "CUDA_VISIBLE_DEVICES", "GGML_DISABLE_VULKAN", "GGML_NO_BACKTRACE", "HIP_VISIBLE_DEVICES",
        "HOME", "LD_LIBRARY_PATH", "MALLOC_ARENA_MAX", "OPENBLAS_NUM_THREADS",
        "PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONUTF8", "TMPDIR",
    }  # fmt: skip
    assert "/secret" not in seen.values()
    assert (seen["GGML_NO_BACKTRACE"], seen["CUDA_VISIBLE_DEVICES"]) == ("1", "-1")
    asked = worker.call("facts", allowance=LOOK_AT_GPU, command=program)
    assert asked["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert "GGML_DISABLE_VULKAN" not in asked


def test_products_on_a_gpu_are_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    program = python("import json, os; print(json.dumps(dict(os.environ)))")
    monkeypatch.setenv("GGML_CUDA_CUBLAS_COMPUTE_TYPE", "f16")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    asked = worker.call("facts", allowance=LOOK_AT_GPU, command=program)
    assert asked["GGML_CUDA_CUBLAS_COMPUTE_TYPE"] == "f32"
    assert asked["NVIDIA_TF32_OVERRIDE"] == "0"


def test_worker_has_the_limits_that_it_was_given() -> None:
    program = python(
        "import sys, json, resource as r; sys.stdin.read();"
        "print(json.dumps({n: r.getrlimit(getattr(r, 'RLIMIT_' + n))[0]"
        " for n in ('AS', 'CPU', 'FSIZE', 'NOFILE', 'CORE')}))"
    )
    given = Allowance(memory=900 * MIB, processor_seconds=77, file=12345)
    assert worker.call("logits", allowance=given, command=program) == {
        "AS": 900 * MIB, "CPU": 77, "FSIZE": 12345, "NOFILE": 512, "CORE": 0,
    }  # fmt: skip
    # CUDA reserves more addresses than any limit that would mean something.
    assert worker.call("facts", allowance=LOOK_AT_GPU, command=program)["AS"] == -1


# --- how it can end


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, as the kernel does"),
        ("import time; time.sleep(60)", "did not finish within 1 s"),
        ("import os, time; os.close(1); os.close(2); time.sleep(60)", "did not finish within 1 s"),
        ("raise SystemExit(7)", "exit code 7$"),
        ("raise RuntimeError('with a text of a user')", r"exit code 1 \(RuntimeError\)$"),
        (
            "import os, sys; sys.stderr.write('CUDA error: out of memory\\n  current device: 0, in'"
            " ' function alloc\\nggml-cuda.cu:108: CUDA error\\n'); sys.stderr.flush(); os.abort()",
            r"SIGABRT: the GPU failed: out of memory; ask for fewer --gpu-layers$",
        ),
        (
            "import os, sys; sys.stderr.write('x\\nCUDA error: an illegal memory access was'"
            " ' encountered\\n'); sys.stderr.flush(); os.abort()",
            r"SIGABRT: the GPU failed: an illegal memory access was encountered$",
        ),
        ("print('not JSON')", "not JSON"),
        ("print('[' * 100000)", "not JSON"),
        ("print('[1]')", "not a JSON object"),
        ("import sys; [sys.stderr.write('x' * 1000000) for _ in range(300)]; print('?')", "JSON"),
        ("while True: print('x' * 100000)", "answered more than 4194304 bytes"),
        ("import sys; sys.stdin.read(); x = b'1' * (1 << 33)", "no memory beyond the 1.0 GiB"),
        ("import sys; sys.stdin.read(); [open('/') for x in iter(int, 1)]", "exit code 1"),
    ],
)
def test_worker_that_ends_badly_is_an_error_with_its_reason(program: str, reason: str) -> None:
    given = Allowance(seconds=1 if "sleep" in program else 60)
    with pytest.raises(WorkerError, match=reason) as error:
        worker.call("logits", allowance=given, command=python(program))
    assert not [part for part in translate(str(error.value), str) if part.foreign]


def test_long_questions_and_answers_pass_each_other() -> None:
    program = python("print('{\"a\": \"' + 'x' * 3000000 + '\"}'); import sys; sys.stdin.read()")
    assert len(worker.call("logits", command=program, text="y" * 3000000)["a"]) == 3000000


def test_stopped_worker_is_killed_when_its_time_is_over(file: Path) -> None:
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(work_long, file, replace(to_read(file), seconds=3))
        pid = wait_for(lambda: next(children(os.getpid()), None))
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match="did not finish within 3 s"):
            asked.result()
    assert not Path(f"/proc/{pid}").exists()


def test_worker_ends_with_whoever_asked(file: Path) -> None:
    program = (
        "from medllm_pack.parity import worker; from medllm_pack.parity.allowance import *;"
        f"worker.call('continue', allowance=Allowance(), model={str(file)!r}, tokens=2,"
        "prompts=[list(range(1, 251))] * 10000, threads=1, gpu_layers=0)"
    )
    with subprocess.Popen(python(program)) as asking:
        pid = wait_for(lambda: next(children(asking.pid), None))
        wait_for(lambda: processor_seconds(pid) > 1)  # it is at work
        asking.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_worker_whose_parent_ended_before_it_could_ask_for_a_signal_does_nothing() -> None:
    question = json.dumps({"job": "facts", "arguments": {}, "asked_by": os.getpid() + 1})
    root = str(Path(__file__).parent.parent)
    ended = subprocess.run(
        worker.COMMAND, input=question.encode(), capture_output=True, check=False,
        env={"PYTHONPATH": root},
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, b"", b"")


def children(parent: int) -> Iterator[int]:
    """Yield workers that a process started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat, line = (path / "stat").read_text(), (path / "cmdline").read_bytes()
        except OSError:  # ended meanwhile
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and b"parity.worker" in line:
            yield int(path.name)


def processor_seconds(pid: int) -> float:
    """Return how long a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(look: Callable[[], T | None]) -> T:
    """Return what is seen once there is something to see."""
    for _ in range(300):
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError("nothing came")


# --- limits that llama.cpp meets


def test_too_little_memory_is_an_error_wherever_llama_cpp_meets_it(
    file: Path, target: Path
) -> None:
    met = []
    for mib in range(80, 1000, 8):
        given = replace(to_read(file), memory=mib * MIB, file=MIB)
        try:
            logits(file, given, target)
            break
        except WorkerError as error:
            met.append(str(error))
    assert len(met) > 1
    assert "memory" in met[-1]  # before that, Python's own libraries have no room


def test_context_that_does_not_fit_is_said_with_llama_cpps_reason(file: Path) -> None:
    given = replace(to_read(file), memory=500 * MIB)
    with pytest.raises(WorkerError, match=r"no room for 1000001 tokens of '.*gguf': '.*allocate"):
        worker.call(
            "continue", allowance=given, model=str(file), prompts=[[1] * 999_990], tokens=10,
            threads=1, gpu_layers=0,
        )  # fmt: skip


def test_processor_time_is_over_by_name(file: Path) -> None:
    given = replace(to_read(file), processor_seconds=1)
    with pytest.raises(WorkerError, match="ended by SIGXCPU: it may use 1 s of processor time"):
        work_long(file, given)


def test_file_that_grows_too_large_is_said(file: Path, target: Path) -> None:
    with pytest.raises(WorkerError, match="'logits' could not be written: not all of it"):
        logits(file, replace(to_read(file), file=1000), target)
    assert target.stat().st_size <= 1000


def test_answer_that_grows_too_long_is_cut(file: Path) -> None:
    given = replace(to_read(file), answer=100)
    with pytest.raises(WorkerError, match="answered more than 100 bytes"):
        worker.call("tokenize", allowance=given, model=str(file), texts=["dor " * 1000])


def test_refused_file_is_said_with_llama_cpps_reason_and_no_folder(
    file: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(WorkerError, match=r"does not load 'cut\.gguf': .*within the file") as e:
        worker.call("tokenize", model=str(cut), texts=["a"])
    assert str(tmp_path) not in str(e.value)


@pytest.mark.parametrize("tokens", [0, 8])
def test_sound_files_need_less_than_half_of_what_they_may_take(
    file: Path, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "_BASE", allowance._BASE // 2)
    monkeypatch.setattr(allowance, "_ROOM", 1)
    jobs = Jobs(file, CONFIG, Runtime(threads=2))
    prompts = [[1, *range(259, 300)] * 12]  # near the longest that the model is made for
    if tokens:
        assert len(jobs.continue_(prompts, tokens)[0]) <= tokens
    else:
        with Nameless() as place:
            (path,) = jobs.logits(prompts, place)
            assert np.load(path).shape == (len(prompts[0]), CONFIG.vocab_size)


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        ([256] * 4, [[0, 1], [2, 3]]),
        ([600, 10, 502, 1, 512, 2], [[0], [1, 2], [3], [4], [5]]),
        ([3] * 19, [list(range(8)), list(range(8, 16)), [16, 17, 18]]),
    ],
)
def test_texts_that_fit_into_a_batch_go_together(
    lengths: list[int], batches: list[list[int]]
) -> None:
    assert [list(batch) for batch in allowance.in_batches(lengths)] == batches


def test_allowance_of_a_7b_is_known(tmp_path: Path) -> None:
    shape = SimpleNamespace(
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=32,
        num_hidden_layers=32, vocab_size=32000,
    )  # fmt: skip
    file = tmp_path / "sparse.gguf"
    with file.open("wb") as hole:
        hole.truncate(13_478_104_576)
    given = to_compute(file, shape, [256] * 16, tokens=0, threads=4, gpu=False, writes=True)
    assert given.memory is not None
    assert 14.5e9 < given.memory < 16.5e9
    assert given.file == 257 * 32000 * 4 + 4096
    assert 3600 < given.seconds < 12 * 3600
    on_gpu = to_compute(file, shape, [256], tokens=0, threads=4, gpu=True)
    assert (on_gpu.memory, on_gpu.gpu) == (None, True)


@pytest.fixture
def gpu_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The libraries that a llama-cpp-python for CUDA carries, by name and size."""
    for name in ("ggml", "ggml-base", "ggml-cpu", "ggml-cuda", "llama"):
        with (tmp_path / f"lib{name}.so").open("wb") as hole:
            hole.truncate(300 * MIB)
    monkeypatch.setattr(ggml, "_folder", lambda: tmp_path)
    ggml.gpu_libraries.cache_clear()
    yield tmp_path
    ggml.gpu_libraries.cache_clear()


def test_build_for_a_gpu_may_map_the_libraries_that_it_needs(file: Path, gpu_build: Path) -> None:
    assert ggml.gpu_libraries() == {"cuda": 300 * MIB}
    assert to_read(file).memory == 5 * 1024 * MIB + 300 * MIB + file.stat().st_size
    assert not to_read(file).gpu


def test_missing_gpu_is_told_from_a_build_without_support_for_one(gpu_build: Path) -> None:
    assert _missing("failed to initialize CUDA: no CUDA-capable device is detected") == (
        "the installed llama.cpp is built for cuda and finds no GPU (failed to initialize CUDA: no "
        "CUDA-capable device is detected); see whether nvidia-smi or rocm-smi lists one, or leave "
        "the option out"
    )
    (gpu_build / "libggml-cuda.so").unlink()
    ggml.gpu_libraries.cache_clear()
    assert "built without support for a GPU" in _missing("")


def test_driver_that_is_not_there_is_named_without_a_path(tmp_path: Path) -> None:
    """The words are those of llama-cpp-python's loader and of glibc's."""
    (tmp_path / "llama_cpp.py").write_text(
        "raise RuntimeError(\"Failed to load shared library '/home/ana/lib/libllama.so': \"\n"
        '    "libcuda.so.1: cannot open shared object file: No such file or directory")\n'
    )
    command = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from medllm_pack.parity.worker import main\nmain()"
    )
    with pytest.raises(WorkerError) as error:
        worker.call("facts", allowance=LOOK_AT_GPU, command=command)
    assert "libcuda.so.1 is not found; add its folder to LD_LIBRARY_PATH" in str(error.value)
    assert "ana" not in str(error.value)
    assert not [part for part in translate(str(error.value), str) if part.foreign]


def test_why_a_gpu_fails_is_said_before_the_abort(capfd: pytest.CaptureFixture[str]) -> None:
    for level, text in ((4, b"CUDA error: out of memory\n"), (4, b"  in f at x.cu:7\n"),
                        (3, b"CUDA error: a warning\n"), (4, b"load: bad file\n")):  # fmt: skip
        llamacpp._listen(level, text, ctypes.c_void_p())
    assert capfd.readouterr().err == "CUDA error: out of memory\n"
    llamacpp._complaints.clear()


# --- answers that do not fit


@pytest.mark.parametrize(
    "answer",
    [{}, {"ids": []}, {"ids": [1]}, {"ids": [["a"]]}, {"ids": {"0": []}}, {"ids": [[1], [2]]}],
)
def test_answer_that_does_not_fit_the_question_is_an_error(file: Path, answer: object) -> None:
    program = python(f"print({json.dumps(json.dumps(answer))})")
    with pytest.raises(WorkerError, match="no ids that fit the question"):
        Jobs(file, CONFIG, Runtime(threads=1), program).tokenize(["a"])
