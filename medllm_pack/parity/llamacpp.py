"""The door to llama.cpp as a runtime: load a GGUF file, tokenize, compute logits, write greedily.

Uses the C functions that llama-cpp-python exposes. llama.cpp may abort its process on
a bad file: whoever runs files of others does it in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from medllm_pack.errors import MedllmError, shown
from medllm_pack.parity.allowance import BATCH


class Token(NamedTuple):
    """A token of a batch.

    Attributes:
        id: in the vocabulary.
        position: in its text.
        sequence: which text.
        wanted: whether the logits after it are.
    """

    id: int
    position: int
    sequence: int = 0
    wanted: bool = True


class Model:
    """A GGUF file loaded by llama.cpp, with a context of ``n_ctx`` tokens; 0: vocabulary only.

    Each of ``sequences`` texts has such a context.

    Raises:
        MedllmError: if llama.cpp does not load the file.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        threads: int = 2,
        gpu_layers: int = 0,
        sequences: int = 1,
    ) -> None:
        self._api = api = _api()
        params = api.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.vocab_only = n_ctx == 0
        # Repacked weights (AMX and the like) are another path through llama.cpp's kernels; with
        # 0.3.36 it crashes on some machines. The plain path gives the same answer on all.
        params.use_extra_bufts = False
        self._model = api.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise MedllmError(f"llama.cpp does not load {shown(path.name)}{_reason(path)}")
        self._vocab = api.llama_model_get_vocab(self._model)
        self.n_vocab: int = api.llama_vocab_n_tokens(self._vocab)
        self.n_ctx, self.sequences = n_ctx, sequences
        self._context = self._new_context(threads) if n_ctx else None
        if n_ctx and not self._context:
            self.close()
            raise MedllmError(
                f"llama.cpp has no room for {n_ctx} tokens of {shown(path.name)}{_reason(path)}"
            )

    def _new_context(self, threads: int) -> Any:
        api = self._api
        settings = api.llama_context_default_params()
        settings.n_ctx = self.n_ctx * self.sequences
        settings.n_seq_max = self.sequences
        settings.n_batch = settings.n_ubatch = min(settings.n_ctx, BATCH)
        settings.n_threads = settings.n_threads_batch = threads
        # As with repacking: one way through the kernels on every machine.
        settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return api.llama_init_from_model(self._model, settings)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of a text, with what the file says about BOS and EOS.

        Args:
            text: any text.
            special: whether control tokens written in the text count as such.
        """
        data = text.encode("utf-8")
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = self._api.llama_tokenize(self._vocab, data, len(data), ids, len(ids), True, special)
        return list(ids[:n])

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ids, control tokens left out."""
        pieces = b"".join(self._piece(id_) for id_ in ids)
        return pieces.decode("utf-8", errors="replace")

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits after each id, shape (len(ids), n_vocab), from an empty context.

        Raises:
            MedllmError: if llama.cpp cannot compute them.
        """
        return self.logits_of_all([ids])[0]

    def logits_of_all(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Do that for several texts, at most ``sequences`` of them, each from an empty context."""
        self._forget()
        rows = self._decode(
            [Token(id_, i, text) for text, ids in enumerate(texts) for i, id_ in enumerate(ids)]
        )
        return np.split(rows, np.cumsum([len(ids) for ids in texts])[:-1])

    def write(self, prompt: str, *, tokens: int) -> str:
        """Return the greedy continuation of a prompt, up to an end of text."""
        return self.detokenize(self.continue_greedily(self.tokenize(prompt), tokens=tokens))

    def continue_greedily(self, ids: Sequence[int], *, tokens: int) -> list[int]:
        """Return the ids of the greedy continuation, up to an end of text (left out)."""
        return [id_ for id_, _ in self.follow(ids, tokens=tokens)]

    def follow(self, ids: Sequence[int], *, tokens: int) -> list[tuple[int, float]]:
        """Return each id of the greedy continuation, and by how much its logit led."""
        return self.follow_all([ids], tokens=tokens)[0]

    def follow_all(
        self, prompts: Sequence[Sequence[int]], *, tokens: int
    ) -> list[list[tuple[int, float]]]:
        """Do that for several prompts, at most ``sequences`` of them, a token of each at a time.

        So the weights pass through memory, or come from a disk, once for a token of all.
        """
        self._forget()
        written: list[list[tuple[int, float]]] = [[] for _ in prompts]
        fresh = [
            Token(id_, position, sequence, wanted=position == len(ids) - 1)
            for sequence, ids in enumerate(prompts)
            if tokens and len(ids) < self.n_ctx
            for position, id_ in enumerate(ids)
        ]
        while fresh:
            ends = [token for token in fresh if token.wanted]
            after = zip(ends, self._decode(fresh), strict=True)
            chosen = [self._go_on(*one, written, tokens=tokens) for one in after]
            fresh = [token for token in chosen if token]
        return written

    def _go_on(
        self,
        token: Token,
        scores: NDArray[np.float32],
        written: Sequence[list[tuple[int, float]]],
        *,
        tokens: int,
    ) -> Token | None:
        """Note the id that leads after a token; return it unless its text ends there."""
        best = int(scores.argmax())
        if self._api.llama_vocab_is_eog(self._vocab, best):
            return None
        second, first = np.partition(scores, -2)[-2:]
        text, position = written[token.sequence], token.position + 1
        text.append((best, float(first - second)))
        if len(text) == tokens or position + 1 >= self.n_ctx:
            return None
        return Token(best, position, token.sequence)

    def close(self) -> None:
        """Free model and context."""
        if self._model:
            if self._context:
                self._api.llama_free(self._context)
            self._api.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _forget(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _piece(self, id_: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = self._api.llama_token_to_piece(self._vocab, id_, buffer, len(buffer), 0, False)
        return buffer.raw[: max(n, 0)]

    def _decode(self, tokens: Sequence[Token]) -> NDArray[np.float32]:
        """Return the logits after the tokens that want them, shape (of those, n_vocab)."""
        parts = (tokens[at : at + BATCH] for at in range(0, len(tokens), BATCH))
        return np.concatenate([self._decode_batch(part) for part in parts])

    def _decode_batch(self, tokens: Sequence[Token]) -> NDArray[np.float32]:
        n = len(tokens)
        batch = self._api.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token.id, token.position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, token.sequence
                batch.logits[i] = token.wanted
            code = self._api.llama_decode(self._context, batch)
        finally:
            self._api.llama_batch_free(batch)
        if code != 0:
            raise MedllmError(f"llama.cpp could not compute {n} tokens (code {code})")
        rows = sum(token.wanted for token in tokens)
        if not rows:
            return np.empty((0, self.n_vocab), dtype=np.float32)
        pointer = self._api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.n_vocab)).copy()


def look_for_gpu() -> tuple[bool, str]:
    """Say whether this build of llama.cpp finds a GPU to compute on, and what it complains of."""
    found = bool(_load().llama_supports_gpu_offload())
    return found, shown(_complaints[0]) if _complaints else ""


def _api() -> Any:
    """Return llama-cpp-python's bindings, their log taken in silence."""
    api = _load()
    # It looks for GPUs when it is first asked for anything, and one that is hidden is an error to
    # it. No model is to blame for that.
    api.llama_supports_gpu_offload()
    _complaints.clear()
    return api


def _load() -> Any:
    try:
        import llama_cpp
    except (OSError, RuntimeError) as error:  # its own error has the loader's words, with a path
        library = _NOT_FOUND.search(str(error))
        reason = (
            f": {library[1]} is not found; add its folder to LD_LIBRARY_PATH, or"
            if library
            else ";"
        )
        raise MedllmError(
            f"llama-cpp-python does not load{reason} install it again: "
            "pip install --force-reinstall llama-cpp-python"
        ) from error
    llama_cpp.llama_log_set(_LISTENER, None)
    return llama_cpp


def _reason(path: Path) -> str:
    """Return what llama.cpp complained of first since a model was asked for."""
    text = next(iter(_complaints), "").replace(str(path), path.name)
    return f": {shown(text)}" if text else ""


def _listen(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    """Take a line of llama.cpp's log; a few errors are remembered."""
    if level == _ERROR and text.startswith(GPU_FAILS):
        # It aborts now. Words of the driver about itself; whoever started this process knows them.
        os.write(2, text)
    if level == _ERROR and len(_complaints) < 3:
        # "name_of_a_function: what is wrong"
        _complaints.append(text.decode("utf-8", "replace").strip().partition(": ")[2][:200])


_ERROR = 4  # GGML_LOG_LEVEL_ERROR
GPU_FAILS = (b"CUDA error: ", b"ROCm error: ")  # ggml-cuda.cu: ggml_cuda_error
# What glibc's loader says of a library that a GPU's build needs, libcuda.so.1 for example.
_NOT_FOUND = re.compile(r"\b(lib[\w.+-]+): cannot open shared object file")
_complaints: list[str] = []
# Kept for the life of the process: llama.cpp holds the pointer.
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(_listen)
