"""Layout, names, vocabulary and strict reader, against gguf-py, SentencePiece and llama.cpp."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from medllm_pack.errors import CheckpointError, GGUFError, VocabularyError
from medllm_pack.gguf import llama
from medllm_pack.gguf.layout import Entry, lay_out, order_key, row_bytes
from medllm_pack.gguf.reader import read_gguf
from medllm_pack.gguf.vocab import read_vocabulary
from medllm_pack.quant import ggml
from tests import pico

ENTRIES = (
    Entry("general.architecture", GGUFValueType.STRING, "llama"),
    Entry("x.text", GGUFValueType.STRING, "ação µg 10⁹/L"),
    Entry("x.list", GGUFValueType.STRING, ("a", "é", "")),
    Entry("x.floats", GGUFValueType.FLOAT32, (0.5, -1.0)),
    Entry("x.flag", GGUFValueType.BOOL, True),
    Entry("x.wide", GGUFValueType.UINT64, 1 << 40),
    Entry("x.ints", GGUFValueType.INT32, (-1, 2, 3)),
)
TENSORS = (
    ("blk.10.attn_q.weight", (64, 256), "Q4_K"),
    ("blk.2.ffn_norm.weight", (256,), "F32"),
    ("blk.2.attn_q.weight", (3, 32), "Q8_0"),
    ("token_embd.weight", (5, 256), "Q6_K"),
    ("output.weight", (5, 256), "F16"),
)


def planned(tmp_path: Path) -> Path:
    layout = lay_out(ENTRIES, TENSORS, file_type=15)
    path = tmp_path / "x.gguf"
    path.write_bytes(layout.header + bytes(layout.size - len(layout.header)))
    return path


def test_header_is_read_back_by_gguf_py(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(planned(tmp_path))
    layout = lay_out(ENTRIES, TENSORS, file_type=15)
    assert [t.name for t in reader.tensors] == [slot.name for slot in layout.slots]
    for theirs, slot in zip(reader.tensors, layout.slots, strict=True):
        assert tuple(reversed(theirs.shape.tolist())) == slot.shape
        assert theirs.tensor_type.name == slot.type
        assert (theirs.data_offset, theirs.n_bytes) == (slot.offset, slot.nbytes)
    for entry in ENTRIES:
        value = reader.fields[entry.key].contents()
        assert value == (list(entry.value) if isinstance(entry.value, tuple) else entry.value)


def test_our_reader_reads_what_gguf_py_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_string("x.text", "dor torácica")
    writer.add_array("x.list", ["a", "b"])
    writer.add_float32("x.number", 0.25)
    writer.add_tensor("a.weight", np.zeros((4, 32), dtype=np.float16))
    writer.add_tensor("b.weight", np.ones(7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "x.gguf")
    assert found.metadata["x.text"] == "dor torácica"
    assert found.metadata["x.list"] == ("a", "b")
    assert [(t.name, t.shape, t.type) for t in found.tensors] == [
        ("a.weight", (4, 32), "F16"),
        ("b.weight", (7,), "F32"),
    ]


def test_tensors_stand_in_llama_cpps_order() -> None:
    names = [slot.name for slot in lay_out(ENTRIES, TENSORS, file_type=15).slots]
    assert names == [
        "output.weight", "token_embd.weight", "blk.2.attn_q.weight", "blk.2.ffn_norm.weight",
        "blk.10.attn_q.weight",
    ]  # fmt: skip
    assert order_key("blk.9.x") < order_key("blk.10.x")


# Q8_1 and Q8_K hold activations while llama.cpp computes; no file has them.
STORED = [kind.name for kind in gguf.GGMLQuantizationType if kind.name not in ("Q8_1", "Q8_K")]


@pytest.mark.parametrize("kind", STORED)
def test_row_bytes_equal_ggmls(kind: str) -> None:
    row_size = ggml.library().ggml_row_size
    row_size.restype, row_size.argtypes = ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]
    assert row_bytes(kind, 512) == row_size(int(gguf.GGMLQuantizationType[kind]), 512)


def test_row_that_is_no_whole_number_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="288 weights does not divide into Q4_K blocks of 256"):
        row_bytes("Q4_K", 288)


# --- the strict reader -------------------------------------------------------------------------

HEAD = struct.pack("<4sI", b"GGUF", 3)


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def pair(key: bytes, kind: int, data: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + data


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def document(pairs: list[bytes], tensors: list[bytes], data: int = 0) -> bytes:
    body = HEAD + struct.pack("<QQ", len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return body + bytes(-len(body) % 32 + data)


ONE = tensor(b"a", [32], 0, 0)
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "magic": b"GGML" + bytes(60),
    "version 1": struct.pack("<4sI", b"GGUF", 1) + bytes(60),
    "version 0": struct.pack("<4sI", b"GGUF", 0) + bytes(60),
    "version big endian": struct.pack(">4sI", b"GGUF", 3) + bytes(60),
    "tensors 2^63": HEAD + struct.pack("<QQ", 1 << 63, 0) + bytes(40),
    "pairs 2^63": HEAD + struct.pack("<QQ", 0, 1 << 63) + bytes(40),
    "key longer than the file": HEAD + struct.pack("<QQQ", 0, 1, 200) + bytes(8),
    "empty key": document([pair(b"", 4, bytes(4))], []),
    "key twice": document([pair(b"k", 4, bytes(4))] * 2, []),
    "key not UTF-8": document([pair(b"\xff\xfe", 4, bytes(4))], []),
    "unknown type": document([pair(b"k", 99, bytes(4))], []),
    "boolean 2": document([pair(b"k", 7, b"\x02")], []),
    "string 2^62": document([pair(b"k", 8, struct.pack("<Q", 1 << 62))], []),
    "array of arrays": document([pair(b"k", 9, struct.pack("<IQ", 9, 1))], []),
    "array 2^60": HEAD + struct.pack("<QQ", 0, 1) + pair(b"k", 9, struct.pack("<IQ", 4, 1 << 60)),
    "array longer than the file": document([pair(b"k", 9, struct.pack("<IQ", 0, 1 << 20))], []),
    "alignment 0": document([pair(b"general.alignment", 4, struct.pack("<I", 0))], []),
    "alignment 48": document([pair(b"general.alignment", 4, struct.pack("<I", 48))], []),
    "alignment a string": document([pair(b"general.alignment", 8, string(b"32"))], []),
    "no dimensions": document([], [tensor(b"a", [], 0, 0)], 128),
    "five dimensions": document([], [tensor(b"a", [32, 1, 1, 1, 1], 0, 0)], 128),
    "size zero": document([], [tensor(b"a", [0], 0, 0)], 0),
    "size 2^60": document([], [tensor(b"a", [1 << 60, 4], 0, 0)], 128),
    "product wraps": document([], [tensor(b"a", [1 << 32, 1 << 32], 0, 0)], 128),
    "type unknown": document([], [tensor(b"a", [32], 200, 0)], 128),
    "row not a block": document([], [tensor(b"a", [33], 8, 0)], 64),
    "name twice": document([], [ONE, tensor(b"a", [32], 0, 128)], 256),
    "name of 64 bytes": document([], [tensor(b"a" * 64, [32], 0, 0)], 128),
    "overlap": document([], [ONE, tensor(b"b", [32], 0, 64)], 256),
    "hole": document([], [ONE, tensor(b"b", [32], 0, 256)], 384),
    "offset not aligned": document([], [tensor(b"a", [32], 0, 1)], 160),
    "truncated": document([], [ONE], 127),
    "trailing bytes": document([], [ONE], 129),
    "archive behind it": document([], [ONE], 128) + b"PK\x03\x04",
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_file_is_a_gguf_error_at_once(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(MALFORMED[fault])
    start = time.perf_counter()
    with pytest.raises(GGUFError):
        read_gguf(path)
    assert time.perf_counter() - start < 1


def test_minimal_document_is_accepted(tmp_path: Path) -> None:
    """The builder of the malformed files makes sound ones too."""
    (tmp_path / "x.gguf").write_bytes(document([pair(b"k", 4, bytes(4))], [ONE], 128))
    assert read_gguf(tmp_path / "x.gguf").parameters == 32


def test_missing_file_folder_and_fifo_are_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(GGUFError, match="cannot be read"):
            read_gguf(path)
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(GGUFError):
        read_gguf(tmp_path / "x.gguf")


@given(at=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 64))
@settings(max_examples=300, deadline=None)
def test_mutated_header_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: int
) -> None:
    layout = lay_out(ENTRIES, TENSORS, file_type=15)
    data = bytearray(layout.header + bytes(layout.size - len(layout.header)))
    data[at] = value
    path = tmp_path_factory.getbasetemp() / "mutant.gguf"
    path.write_bytes(bytes(data[: len(data) - cut]))
    with contextlib.suppress(GGUFError):
        read_gguf(path)


# --- facts of the family -----------------------------------------------------------------------


def test_interleaving_is_transformers_rotation_undone() -> None:
    """Rotating neighbours of interleaved rows equals rotating halves of the original ones."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    heads, dim, columns = 3, 8, 16
    rows = pico.ramp((heads * dim, columns), 1).astype(np.float64)
    x = pico.ramp((1, columns), 2).astype(np.float64)[0]
    angles = np.array([0.3, 0.7, 1.1, 1.9])
    halves = torch.from_numpy((rows @ x).reshape(1, heads, 1, dim))
    doubled = torch.from_numpy(np.concatenate([angles, angles])).reshape(1, 1, dim)
    rotated, _ = apply_rotary_pos_emb(halves, halves, doubled.cos(), doubled.sin())
    mixed = (llama.interleave(rows, dim) @ x).reshape(heads, dim // 2, 2)
    even, odd = mixed[..., 0], mixed[..., 1]
    neighbours = np.stack(
        [
            even * np.cos(angles) - odd * np.sin(angles),
            even * np.sin(angles) + odd * np.cos(angles),
        ],
        axis=-1,
    )
    expected = rotated.numpy().reshape(heads, 2, dim // 2).swapaxes(1, 2)
    np.testing.assert_allclose(neighbours, expected, rtol=1e-12)


def test_tensor_names_equal_gguf_pys_map() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    config = llama.parse_config(replace(pico.LLAMA, layers=3).config())
    for item in llama.tensors(config):
        assert names.get_name(item.source, try_suffixes=(".weight",)) == item.name


@pytest.mark.parametrize("shape", [pico.LLAMA, pico.MISTRAL, replace(pico.LLAMA, tied=True)])
def test_expected_tensors_are_those_of_transformers(shape: pico.Pico) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**shape.config())
    model = AutoModelForCausalLM.from_config(config)
    theirs = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if shape.tied:
        theirs.pop("lm_head.weight")
    ours = {t.source: t.shape for t in llama.tensors(llama.parse_config(shape.config()))}
    assert ours == theirs


def test_transformers_5_rope_parameters_are_read() -> None:
    old = pico.LLAMA.config(rope_theta=500000.0, rope_scaling={"type": "linear", "factor": 2.0})
    new = pico.LLAMA.config(
        rope_parameters={"rope_type": "linear", "rope_theta": 500000.0, "factor": 2.0}
    )
    del new["rope_theta"]
    assert llama.parse_config(old) == llama.parse_config(new)
    assert llama.parse_config(new).rope_factor == 2.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "None"),
        ({"auto_map": {"AutoModel": "m.M"}}, "auto_map"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"num_key_value_heads": 3}, "3 groups"),
    ],
)
def test_configuration_of_another_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        llama.parse_config(pico.LLAMA.config(**changes))


@pytest.mark.parametrize(
    ("parameters", "label"),
    [(6_738_415_616, "6.74B"), (7_241_732_096, "7.24B"), (7_900_000, "7.90M"), (512, "512")],
)
def test_size_label_is_that_of_model_pages(parameters: int, label: str) -> None:
    assert llama.size_label(parameters) == label


# --- vocabulary --------------------------------------------------------------------------------


def write_tokenizer(folder: Path, model: bytes, **files: Any) -> dict[str, Path]:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {path.name: path for path in folder.iterdir()}


def test_pieces_are_those_of_sentencepiece(tmp_path: Path, tokenizer: bytes) -> None:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=tokenizer)
    vocabulary = read_vocabulary(write_tokenizer(tmp_path / "t", tokenizer), rows=320)
    assert list(vocabulary.tokens) == [processor.id_to_piece(i) for i in range(320)]
    assert list(vocabulary.scores) == [processor.get_score(i) for i in range(320)]
    assert vocabulary.types[0] == gguf.TokenType.UNKNOWN
    assert vocabulary.types[1:3] == (gguf.TokenType.CONTROL, gguf.TokenType.CONTROL)
    assert vocabulary.types.count(gguf.TokenType.BYTE) == 256
    assert dict(vocabulary.special) == {"bos": 1, "eos": 2, "unknown": 0}
    assert (vocabulary.add_bos, vocabulary.add_eos) == (True, False)


def test_added_pad_token_takes_its_row(tmp_path: Path, tokenizer: bytes) -> None:
    """The 32000 against 32001 case: one more row than pieces, held by an added token."""
    paths = write_tokenizer(
        tmp_path / "t", tokenizer, added_tokens={"[PAD]": 320},
        tokenizer_config={
            "pad_token": "[PAD]",
            "added_tokens_decoder": {"320": {"content": "[PAD]", "special": True}},
        },
    )  # fmt: skip
    vocabulary = read_vocabulary(paths, rows=321)
    assert vocabulary.tokens[320] == "[PAD]"
    assert vocabulary.types[320] == gguf.TokenType.CONTROL
    assert vocabulary.special["padding"] == 320
    assert "the rows decide" in vocabulary.notices[0]


def test_added_token_without_a_row_is_left_out_and_said(tmp_path: Path, tokenizer: bytes) -> None:
    paths = write_tokenizer(tmp_path / "t", tokenizer, added_tokens={"[PAD]": 320})
    vocabulary = read_vocabulary(paths, rows=320)
    assert len(vocabulary.tokens) == 320
    assert "[PAD]" in vocabulary.notices[0]
    assert "left out" in vocabulary.notices[0]


def test_rows_without_a_token_are_marked_unused(tmp_path: Path, tokenizer: bytes) -> None:
    vocabulary = read_vocabulary(write_tokenizer(tmp_path / "t", tokenizer), rows=384)
    assert vocabulary.tokens[383] == "[PAD383]"
    assert set(vocabulary.types[320:]) == {int(gguf.TokenType.UNUSED)}


@pytest.mark.parametrize(
    ("rows", "files", "message"),
    [
        (100, {}, "320 pieces, the embedding 100 rows"),
        (321, {"added_tokens": {"<s>": 320}}, "'<s>' twice"),
        (321, {"added_tokens": {"": 320}}, "empty token"),
        (321, {"added_tokens": {"x": -1}}, "has the id"),
        (321, {"added_tokens": {"x": "1"}}, "has the id"),
        (321, {"tokenizer_config": {"added_tokens_decoder": {"1": {}}}}, "has no text"),
        (321, {"tokenizer_config": {"added_tokens_decoder": [1]}}, "is no table"),
        (321, {"tokenizer": {"added_tokens": {"a": 1}}}, "no list"),
        (321, {"tokenizer": {"added_tokens": ["a"]}}, "has no text"),
        (321, {"tokenizer_config": []}, "not a JSON object"),
    ],
)
def test_vocabulary_that_lies_is_refused(
    tmp_path: Path, tokenizer: bytes, rows: int, files: dict[str, Any], message: str
) -> None:
    with pytest.raises(VocabularyError, match=message):
        read_vocabulary(write_tokenizer(tmp_path / "t", tokenizer, **files), rows=rows)


@pytest.mark.parametrize("data", [b"", b"\x80\x04\x95garbage", b"{}", os.urandom(4000)])
def test_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(VocabularyError, match=r"tokenizer\.model"):
        read_vocabulary(write_tokenizer(tmp_path / "t", data), rows=320)


def test_missing_tokenizer_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(VocabularyError, match=r"no tokenizer\.model"):
        read_vocabulary({}, rows=320)


def test_tokens_that_only_tokenizer_json_adds_take_their_rows(
    tmp_path: Path, tokenizer: bytes
) -> None:
    """transformers 5 writes no added_tokens_decoder; what is a piece as well stays a piece."""
    added = [
        {"id": 1, "content": "<s>", "special": True},
        {"id": 320, "content": "<|im_end|>", "special": True},
        {"id": 321, "content": "▁anamnese", "special": False},
        {"id": 400, "content": "<longe>", "special": False},
    ]
    config = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    files = write_tokenizer(
        tmp_path / "t", tokenizer, tokenizer={"added_tokens": added}, tokenizer_config=config
    )
    vocabulary = read_vocabulary(files, rows=322)
    assert vocabulary.tokens[320:] == ("<|im_end|>", " anamnese")
    assert vocabulary.types[320:] == (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    assert vocabulary.scores[1] == 0.0
    assert dict(vocabulary.special) == {"bos": 1, "eos": 320, "unknown": 0, "padding": 320}
    assert any("'<longe>' (id 400) has no row" in notice for notice in vocabulary.notices)
    assert any("eos_token is '<|im_end|>' (id 320)" in notice for notice in vocabulary.notices)


def test_end_of_text_is_what_the_configuration_names(tmp_path: Path, tokenizer: bytes) -> None:
    """As llama.cpp's converter takes it: a chat model ends its turns with a token of its own."""
    config = {"eos_token": {"content": "<|end|>"}, "bos_token": "<nowhere>"}
    paths = write_tokenizer(
        tmp_path / "t", tokenizer, added_tokens={"<|end|>": 320}, tokenizer_config=config
    )
    vocabulary = read_vocabulary(paths, rows=321)
    assert (vocabulary.special["bos"], vocabulary.special["eos"]) == (1, 320)
    assert any("'<nowhere>' as bos_token" in notice for notice in vocabulary.notices)


@pytest.mark.parametrize(
    ("fast", "message"),
    [
        ({"decoder": {"type": "ByteLevel"}}, "Llama 3 and Qwen.*convert_hf_to_gguf"),
        ({"decoder": {"type": "Fuse"}}, "tokenizer.json alone, which is what transformers 5"),
    ],
)
def test_fast_tokenizer_without_a_model_says_what_it_is(
    tmp_path: Path, fast: dict[str, Any], message: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fast))
    with pytest.raises(VocabularyError, match=message):
        read_vocabulary({path.name: path}, rows=320)
