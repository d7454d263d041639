"""Mixes against llama.cpp itself: `llama_model_quantize` in dry runs names the type of each tensor.

The dry runs read headers only, so the models are sparse files. llama.cpp lives in a process of its
own (this module run as a program), because it may abort.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import get_args

import gguf
import numpy as np
import pytest

from docs.make_mixes import LLAMA, PAGE, measure, page
from medllm_pack import resources
from medllm_pack.errors import RecipeError, SourceError, UsageError
from medllm_pack.quant.mixes import (
    BLOCK,
    FALLBACK,
    Mix,
    ModelShape,
    TypeName,
    choose_type,
    load_mix,
    mix_names,
    requires_importance,
)

REPOSITORY = Path(__file__).parents[1]
MIXES = resources.folder("quant_recipes/mixes")
HEAD_DIM = 8
VOCABULARY = 64

GOOD = """
name = "Mine"
file_type = 15
default = "Q4_K"
summary = "All of attention in 6 bits."

[[rule]]
tensors = ["attn_q", "attn_k", "attn_v", "attn_output"]
type = "Q6_K"
"""


@dataclass(frozen=True)
class Sketch:
    """A model as far as it matters here: its header."""

    shape: ModelShape
    n_embd: int = 256
    n_ff: int = 512

    def tensors(self) -> dict[str, tuple[int, ...]]:
        q, kv = self.shape.n_head * HEAD_DIM, self.shape.n_head_kv * HEAD_DIM
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, self.n_embd)}
        if not self.shape.tied:
            shapes["output.weight"] = (VOCABULARY, self.n_embd)
        shapes["output_norm.weight"] = (self.n_embd,)
        block = {
            "attn_norm": (self.n_embd,), "ffn_norm": (self.n_embd,),
            "attn_q": (q, self.n_embd), "attn_k": (kv, self.n_embd), "attn_v": (kv, self.n_embd),
            "attn_output": (self.n_embd, q), "ffn_gate": (self.n_ff, self.n_embd),
            "ffn_up": (self.n_ff, self.n_embd), "ffn_down": (self.n_embd, self.n_ff),
        }  # fmt: skip
        for i in range(self.shape.n_layer):
            shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        return shapes

    def choices(self, mix: Mix, *, importance: bool) -> dict[str, str]:
        return {
            name: choose_type(
                mix, tensor=name, shape=shape, model=self.shape, importance=importance
            )
            for name, shape in self.tensors().items()
        }


# Blocks that eight divides, and some that it does not; one, four, eight and two heads a group.
SKETCHES = (
    *(
        Sketch(ModelShape(n_layer, *heads, tied))
        for n_layer, heads, tied in product(
            (2, 8, 32, 80), ((32, 32), (32, 8), (64, 8), (8, 4)), (False, True)
        )
    ),
    *(Sketch(ModelShape(n_layer, 32, 8, False)) for n_layer in (1, 13, 16, 22, 40, 79, 81)),
    # Rows that 256 does not divide, and such that 32 does not divide either.
    *(
        Sketch(ModelShape(8, 32, 8, tied), *widths)
        for widths in ((288, 256), (256, 288), (288, 288), (272, 512), (256, 272))
        for tied in (False, True)
    ),
)


def write_sketch(sketch: Sketch, path: Path) -> Path:
    """Write header and tensor table with gguf's writer, and holes for the weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(sketch.shape.n_layer)
    writer.add_context_length(64)
    writer.add_embedding_length(sketch.n_embd)
    writer.add_feed_forward_length(sketch.n_ff)
    writer.add_head_count(sketch.shape.n_head)
    writer.add_head_count_kv(sketch.shape.n_head_kv)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    weights = 0
    for name, shape in sketch.tensors().items():
        dtype = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        nbytes = prod(shape) * dtype.itemsize
        writer.add_tensor_info(name, shape, dtype, nbytes)
        weights += gguf.GGUFWriter.ggml_pad(nbytes, 32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, gguf.GGUFWriter.ggml_pad(path.stat().st_size, 32) + weights)
    return path


# llama.cpp's answer.

_LINE = re.compile(rb"\[ *\d+/ *\d+\] (\S+) .* type = +(\w+), size = [^(]*(?:\((\w+)\))?")
_END = b"rc = "


class LlamaCpp:
    """A process that makes dry runs."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.test_mixes"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def choices(self, model: Path, mix: Mix, *, importance: bool) -> tuple[dict[str, str], bool]:
        """Return each tensor's type, and whether a real run would refuse to start."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([str(model), mix.file_type, importance]).encode())
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        types, refuses, line = {}, False, b""
        for line in self.process.stdout:
            if match := _LINE.match(line):
                types[match[1].decode()] = (match[3] or match[2]).decode().upper()
            refuses |= b"will require an imatrix" in line
            if line.startswith(_END):
                break
        assert line == _END + b"0\n", line
        return types, refuses


def _serve() -> None:
    """Answer requests: a line of JSON comes in, llama.cpp's log and the return code go out."""
    import llama_cpp.llama_cpp as llama

    os.dup2(1, 2)  # the log is written to stderr
    llama.llama_log_set(llama.llama_log_callback(), None)  # NULL: its own
    one = (ctypes.c_float * 1)(1.0)
    matrix = (llama.llama_model_imatrix_data * 2)()  # ended by an entry without a name
    matrix[0].name, matrix[0].data, matrix[0].size = b"any", one, 1
    for line in sys.stdin:
        model, file_type, importance = json.loads(line)
        params = llama.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.dry_run = 1, file_type, True
        if importance:
            params.imatrix = matrix
        code = llama.llama_model_quantize(model.encode(), b"", ctypes.byref(params))
        os.write(1, _END + b"%d\n" % code)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[Sketch, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {s: write_sketch(s, folder / f"{i}.gguf") for i, s in enumerate(SKETCHES)}


@pytest.fixture(scope="module")
def llama_cpp() -> Iterator[LlamaCpp]:
    worker = LlamaCpp()
    with worker.process:
        yield worker


@pytest.mark.parametrize("name", mix_names())
def test_choices_are_those_of_llama_cpp(
    name: str, models: dict[Sketch, Path], llama_cpp: LlamaCpp
) -> None:
    mix = load_mix(name)
    for (sketch, path), importance in product(models.items(), (False, True)):
        types, refuses = llama_cpp.choices(path, mix, importance=importance)
        ours = sketch.choices(mix, importance=importance)
        assert ours == types, (sketch, importance)
        needed = any(requires_importance(mix, tensor=t, kind=kind) for t, kind in ours.items())
        assert refuses == (needed and not importance), (sketch, importance)


def test_order_of_tensors_changes_nothing(tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    # llama.cpp counts tensors as it goes; we read the block number. Same, as long as it sorts.
    class Shuffled(Sketch):
        def tensors(self) -> dict[str, tuple[int, ...]]:
            return dict(sorted(super().tensors().items(), reverse=True))

    sketch, mix = Shuffled(ModelShape(32, 32, 8, False)), load_mix("q4_k_m")
    path = write_sketch(sketch, tmp_path / "shuffled.gguf")
    assert llama_cpp.choices(path, mix, importance=False)[0] == sketch.choices(
        mix, importance=False
    )


# Laws of the choice.


@pytest.mark.parametrize("name", mix_names())
def test_every_row_is_a_whole_number_of_blocks(name: str) -> None:
    mix, model = load_mix(name), ModelShape(32, 32, 8, False)
    kinds = {tensor for tensor in SKETCHES[0].tensors() if "norm" not in tensor}
    for tensor, columns in product(kinds, (1, 31, 32, 96, 255, 256, 272, 288, 4096)):
        kind = choose_type(mix, tensor=tensor, shape=(2, columns), model=model, importance=True)
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert columns % block == 0


def test_block_sizes_are_those_of_gguf() -> None:
    for kind in get_args(TypeName):
        block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert BLOCK.get(kind, 256) == block
        assert (kind in FALLBACK) == (block == 256)


def test_tied_embedding_gets_the_type_of_the_output() -> None:
    mix = load_mix("iq2_xxs")
    types = {
        tied: choose_type(
            mix,
            tensor="token_embd.weight",
            shape=(64, 256),
            model=ModelShape(32, 32, 32, tied),
            importance=True,
        )
        for tied in (False, True)
    }
    assert types == {False: "Q2_K", True: "Q5_K"}


def test_embedding_and_output_never_need_a_matrix() -> None:
    mix = load_mix("q2_k_s")
    assert requires_importance(mix, tensor="blk.0.attn_q.weight", kind="Q2_K")
    assert not requires_importance(load_mix("q2_k"), tensor="blk.0.attn_q.weight", kind="Q2_K")
    for tensor in ("token_embd.weight", "output.weight"):
        assert not requires_importance(mix, tensor=tensor, kind="Q2_K")
        assert not requires_importance(mix, tensor=tensor, kind="IQ1_S")


# The shipped files.


@pytest.mark.parametrize("path", sorted(MIXES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_file_is_valid_and_true(path: Path) -> None:
    mix = load_mix(str(path))
    assert mix == load_mix(path.stem) == load_mix(path.stem.upper())
    assert mix.name == path.stem.upper()
    prefix = "ALL" if mix.name == "F32" else "MOSTLY"
    assert mix.file_type == gguf.LlamaFileType[f"{prefix}_{mix.name}"]
    bits = measure(mix, LLAMA).bits
    assert mix.summary.endswith(f"; {bits:.2f} bits per weight in LLaMA-2-7B.")


@pytest.mark.parametrize("name", mix_names())
def test_every_rule_makes_a_difference(name: str) -> None:
    # Also: no rule escapes the comparison with llama.cpp above.
    mix = load_mix(name)
    for i in range(len(mix.rules)):
        less = mix.model_copy(update={"rules": mix.rules[:i] + mix.rules[i + 1 :]})
        assert any(
            sketch.choices(less, importance=importance)
            != sketch.choices(mix, importance=importance)
            for sketch, importance in product(SKETCHES, (False, True))
        ), mix.rules[i]


def test_names_are_the_files_from_large_to_small() -> None:
    assert sorted(mix_names()) == sorted(path.stem for path in MIXES.iterdir())
    sizes = [measure(load_mix(name), LLAMA).nbytes for name in mix_names()]
    assert sizes == sorted(sizes, reverse=True)


def test_page_is_not_stale() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m docs.make_mixes"


def test_example_on_the_page_is_a_valid_mix() -> None:
    block = page().split("## The file\n")[1].split("`layers`")[0]
    mix = Mix.model_validate(tomllib.loads(textwrap.dedent(block)))
    assert set(mix.rules[0].model_fields_set) == set(type(mix.rules[0]).model_fields)


# Names and users' own files.


@pytest.mark.parametrize(
    ("name", "near"), [("q4_k", "q4_k_m"), ("Q4KM", "q4_k_m"), ("int8", None), ("", None)]
)
def test_unknown_name_is_wrong_usage_and_offers_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(UsageError) as caught:
        load_mix(name)
    text = str(caught.value)
    assert caught.value.exit_code == 2
    assert ", ".join(mix_names()) in text
    assert ("Did you mean" in text) == (near is not None)
    assert near is None or repr(near) in text.split("Shipped")[0]


def test_own_mix_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD)
    mix, model = load_mix(str(path)), ModelShape(2, 4, 4, False)
    shape = {"shape": (256, 256), "model": model, "importance": False}
    assert choose_type(mix, tensor="blk.1.attn_k.weight", **shape) == "Q6_K"  # type: ignore[arg-type]
    assert choose_type(mix, tensor="blk.1.ffn_up.weight", **shape) == "Q4_K"  # type: ignore[arg-type]


def problems(path: Path, text: str) -> tuple[str, ...]:
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_mix(str(path))
    assert caught.value.subject == path.name
    return caught.value.problems


def test_broken_mix_lists_every_problem(tmp_path: Path) -> None:
    text = """
        name = "a/b"
        file_type = "15"
        default = "Q4_K_M"
        bits = 4
        [[rule]]
        tensors = ["attn_v", "attention"]
        layers = "last 1/8"
        min_grouping = 4.0
        importance = "yes"
        type = "Q7_K"
        [[rule]]
        tensors = []
        model = "65B"
        """
    found = problems(tmp_path / "broken.toml", text)
    keys = (
        "name", "file_type", "default", "bits", "summary", "rule.0.tensors.1", "rule.0.layers",
        "rule.0.min_grouping", "rule.0.importance", "rule.0.type", "rule.1.tensors",
        "rule.1.model", "rule.1.type",
    )  # fmt: skip
    assert sorted(problem.split(": ")[0] for problem in found) == sorted(keys)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        (GOOD + 'layers = "first 0"', "is not understood; write 'first 4'"),
        (GOOD + 'layers = "first 1/8 "', "is not understood"),
        (GOOD.replace('"attn_q"', '"output"') + 'layers = "first 2"', "output is in no block"),
        (GOOD + '[[rule]]\ntensors = ["attn_v"]\ntype = "Q8_0"', "rule 1 is never reached"),
        (GOOD + "[[rule", "not valid TOML"),
        (GOOD.replace("6 bits", "\x00"), "not valid TOML"),
    ],
)
def test_mix_that_cannot_be_meant_is_refused(tmp_path: Path, text: str, fact: str) -> None:
    (problem,) = problems(tmp_path / "mine.toml", text)
    assert fact in problem


def test_rule_with_a_condition_leaves_the_rest_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    conditions = ('layers = "first 1"', "min_grouping = 2", 'model = "70B"', "importance = false")
    for condition in conditions:
        path.write_text(GOOD + condition + '\n[[rule]]\ntensors = ["attn_v"]\ntype = "Q8_0"')
        assert len(load_mix(str(path)).rules) == 2


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="absent.toml"):
        load_mix(str(tmp_path / "absent.toml"))


if __name__ == "__main__":
    _serve()
