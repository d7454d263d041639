"""The door to llama.cpp, against llama-cpp-python's own high-level class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medllm_pack.errors import MedllmError
from medllm_pack.parity.llamacpp import Model
from tests.test_build import pico_file

TEXTS = ["Paciente de 64 anos", " dor  torácica\n", "µg, 10⁹/L 🩺", "</s>", ""]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, tokenizer: bytes) -> Path:
    return pico_file(tmp_path_factory.mktemp("door"), tokenizer, "F32")


def test_tokens_logits_and_text_equal_llama_cpp_pythons(file: Path) -> None:
    from llama_cpp import Llama

    reference = Llama(str(file), n_ctx=512, n_threads=2, verbose=False, logits_all=True, seed=1)
    with Model(file) as model:
        for text in TEXTS:
            assert model.tokenize(text) == reference.tokenize(text.encode(), special=False)
        ids = model.tokenize(TEXTS[0])
        reference.eval(ids)
        expected = np.array(reference.scores[: len(ids)], dtype=np.float32)
        np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=1e-4)
        completed = reference.create_completion(TEXTS[0], max_tokens=12, temperature=0.0)
        # The class drops bytes that are no character yet; we show that they are there.
        ours = model.write(TEXTS[0], tokens=12).replace("\ufffd", "")
        assert ours == completed["choices"][0]["text"]


def test_logits_do_not_depend_on_what_was_computed_before(file: Path) -> None:
    with Model(file) as model:
        first = model.logits([1, 300, 301])
        model.write("Exame físico", tokens=5)
        np.testing.assert_array_equal(model.logits([1, 300, 301]), first)


def test_logits_of_texts_together_are_those_of_each_alone(file: Path) -> None:
    texts = [[1, 300, 301], [1], [1] + [295, 290] * 150, [1, 291] * 140]  # more than a batch
    with Model(file, n_ctx=512) as model:
        alone = [model.logits(ids) for ids in texts]
    with Model(file, n_ctx=512, sequences=4) as model:
        for _ in range(2):  # what was computed before does not count
            together = model.logits_of_all(texts)
            for one, other in zip(alone, together, strict=True):
                np.testing.assert_allclose(other, one, rtol=0, atol=1e-4)


def test_texts_written_together_are_those_written_alone(file: Path) -> None:
    prompts = [[1, 300, 301], [1, 290], [1, 291, 292, 293, 294], [1] + [295] * 14]
    with Model(file, n_ctx=16) as model:
        alone = [model.follow(prompt, tokens=11) for prompt in prompts]
    with Model(file, n_ctx=16, sequences=4) as model:
        together = model.follow_all(prompts, tokens=11)
    assert [len(text) for text in alone] == [11, 11, 11, 1]  # a context ends where it is full
    for one, other in zip(alone, together, strict=True):
        assert [id_ for id_, _ in one] == [id_ for id_, _ in other]
        for (_, lead), (_, led) in zip(one, other, strict=True):
            assert abs(lead - led) < 1e-3


def test_file_that_llama_cpp_refuses_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(MedllmError, match=r"does not load 'x\.gguf': 'bad GGUF version") as error:
        Model(tmp_path / "x.gguf")
    assert str(tmp_path) not in str(error.value)
