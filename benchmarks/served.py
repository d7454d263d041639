r"""What servers that run a file differently write, to set the limits of the rung *served* by.

    python -m benchmarks.served [--variants f16,q4_k_m] [--notes 80]

A server computes with its own threads, batches and kernels. Each of these ways is put behind a
loopback server here, and asked over HTTP as parity asks Ollama: greedily, 12 tokens after the
opening of each held-out note. Printed is how often it goes on as parity's worker does; by how many
logits the worker's token led at most where the two part; the least and the most that sixteen notes
(parity asks sixteen) agree by the shipped limits, and how many groups of sixteen pass. Then the
same for servers that are wrong: another variant, a prompt that begins otherwise, penalties, a
temperature, the base model.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from transformers import AutoConfig

from medllm_pack import resources
from medllm_pack.limits import Limits
from medllm_pack.ollama.server import Address, Server
from medllm_pack.pack.build import build
from medllm_pack.pack.plan import Request, make_plan
from medllm_pack.parity import llamacpp
from medllm_pack.parity.jobs import Jobs
from medllm_pack.parity.runtime import Runtime
from medllm_pack.parity.served import compare_texts, find_parting, opening
from medllm_pack.parity.texts import shipped_texts
from medllm_pack.progress import Silent
from medllm_pack.recipe import load_recipe, recipe_path

TOKENS: Final = 12
ASKED: Final = 16  # notes that parity asks for
VARIANTS: Final = ("f16", "q8_0", "q4_k_m", "q2_k")


@dataclass(frozen=True)
class Way:
    """How a server runs a file, and what it does wrong.

    Attributes:
        context: settings of llama.cpp's context that differ.
        repack: whether weights are repacked.
        before: text that it puts before a prompt.
        penalty: by which it divides the logits of the last 64 tokens.
        temperature: at which it draws; 0 is greedy.
        variant: that it runs instead.
    """

    name: str
    context: Mapping[str, int] = field(default_factory=dict)
    repack: bool = False
    before: str = ""
    penalty: float = 1.0
    temperature: float = 0.0
    variant: str | None = None


_FLASH, _KV_8 = {"flash_attn_type": 1}, {"flash_attn_type": 1, "type_k": 8, "type_v": 8}
_TWO = {"n_threads": 2, "n_threads_batch": 2}
SOUND: Final = (
    Way("the same"), Way("two threads", _TWO),
    Way("batches of 8", {"n_ubatch": 8}), Way("batches of 1", {"n_ubatch": 1}),
    Way("flash attention", _FLASH), Way("repacked", repack=True),
    Way("repacked, flash attention", _FLASH, repack=True),
    Way("the same, batches of 8", _FLASH | {"n_ubatch": 8}, repack=True),
    Way("cache of keys in Q8_0", _KV_8, repack=True),
)  # fmt: skip
WRONG: Final = (
    Way("three words before", before="Nota de evolução\n"), Way("BOS twice", before="<s>"),
    Way("penalty 1.1", penalty=1.1), Way("temperature 0.8", temperature=0.8),
    Way("Q4_K_M instead", variant="q4_k_m"), Way("Q8_0 instead", variant="q8_0"),
    Way("base model instead", variant="base"),
)  # fmt: skip


class Runner(llamacpp.Model):
    """A file, run in some way."""

    def __init__(self, path: Path, way: Way, *, n_ctx: int) -> None:
        self.path, self.way, self.random = path, way, np.random.default_rng(7)
        super().__init__(path, n_ctx=n_ctx, threads=1)

    def _new_context(self, threads: int) -> Any:
        api = self._api
        if self.way.repack:  # load it again, this time with all that the machine offers
            api.llama_model_free(self._model)
            usual = api.llama_model_default_params()
            self._model = api.llama_model_load_from_file(str(self.path).encode(), usual)
            self._vocab = api.llama_model_get_vocab(self._model)
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = self.n_ctx
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for name, value in self.way.context.items():
            setattr(settings, name, value)
        return api.llama_init_from_model(self._model, settings)

    def respond(self, prompt: str) -> str:
        """Return what the server writes after a prompt."""
        self._forget()
        ids = self.tokenize(self.way.before + prompt, special=True)
        fresh, written = ids, list[int]()
        while len(written) < TOKENS:
            start = len(ids) - len(fresh)
            tokens = [llamacpp.Token(id_, start + i) for i, id_ in enumerate(fresh)]
            scores = self._decode(tokens)[-1]
            fresh = [self._choose(scores, ids[-64:])]
            if self._api.llama_vocab_is_eog(self._vocab, fresh[0]):
                break
            written += fresh
            ids = ids + fresh
        return self.detokenize(written)

    def _choose(self, scores: NDArray[np.float32], seen: Sequence[int]) -> int:
        punished = scores.astype(np.float64)
        for id_ in set(seen):
            score = punished[id_]
            punished[id_] = score / self.way.penalty if score > 0 else score * self.way.penalty
        if self.way.temperature == 0:
            return int(punished.argmax())
        odds = np.exp((punished - punished.max()) / self.way.temperature)
        return int(self.random.choice(len(odds), p=odds / odds.sum()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--notes", type=int, default=80)
    given = parser.parse_args()
    prompts = [opening(note) for note in shipped_texts(count=given.notes).notes]
    config = AutoConfig.from_pretrained(resources.folder("examples/tiny/base"))
    print(
        f"{'variant':10}{'server':28}{'alike':>8}{'lead':>8}{'least':>9}{'most':>9}{'passed':>12}"
    )
    with TemporaryDirectory() as temporary:
        files = _build(Path(temporary), given.variants.split(","))
        for quant in given.variants.split(","):
            jobs = Jobs(files[quant], config, Runtime(threads=1))
            written = jobs.write(prompts, TOKENS)["written"]
            for way in (*SOUND, *(way for way in WRONG if way.variant != quant)):
                with _served(files[way.variant or quant], way) as server:
                    texts = [
                        server.generate("m", prompt, raw=True, options={}).text
                        for prompt in prompts
                    ]
                print(f"{quant:10}{way.name:28}{_row(texts, written)}", flush=True)


def _build(place: Path, quants: Sequence[str]) -> dict[str, Path]:
    """Build the variants of the tiny model, and its base alone."""
    path = recipe_path("tiny")
    recipe = load_recipe(path)
    wanted = tuple(dict.fromkeys((*quants, "q4_k_m", "q8_0")))
    built = build(make_plan(Request(recipe, path.parent, place / "p", wanted), report=Silent()))
    alone = recipe.model_copy(update={"base": None, "adapter": None, "merged": recipe.base})
    base = build(make_plan(Request(alone, path.parent, place / "b", ("f16",)), report=Silent()))
    files = {entry["quant"]: built.folder / entry["file"] for entry in built.manifest["variants"]}
    return files | {"base": base.folder / base.manifest["variants"][0]["file"]}


@contextmanager
def _served(path: Path, way: Way) -> Iterator[Server]:
    """Run a file in some way behind a loopback server that answers as Ollama does."""
    with closing(Runner(path, way, n_ctx=256)) as runner:

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802
                question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = {"response": runner.respond(question["prompt"]), "done": True}
                data = json.dumps(answer).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        http = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield Server(Address("http", "127.0.0.1", http.server_port), timeout=600)
        finally:
            http.shutdown()
            thread.join()
            http.server_close()


def _row(texts: Sequence[str], written: Sequence[Mapping[str, Any]]) -> str:
    """Return the share of tokens alike, the largest lead where texts part, and what fours get."""
    limits, total = Limits(), sum(len(w["texts"]) for w in written)
    partings = [
        find_parting(text, ours["texts"], ours["margins"])
        for text, ours in zip(texts, written, strict=True)
    ]
    leads = [parting[1] for parting in partings if parting]
    counted = _compared(texts, written, tie=limits.served_tie)
    shares = [_share(counted[i : i + ASKED]) for i in range(0, len(texts), ASKED)]
    passed = sum(share >= limits.served_agreement for share in shares)
    alike = sum(n for n, _ in counted) / total
    return (
        f"{alike:8.1%}{max(leads, default=0.0):8.3f}{min(shares):9.1%}{max(shares):9.1%}"
        f"{passed:6} of {len(shares)}"
    )


def _compared(
    texts: Sequence[str], written: Sequence[Mapping[str, Any]], *, tie: float
) -> list[tuple[int, int]]:
    return [
        compare_texts(text, ours["texts"], ours["margins"], tie)
        for text, ours in zip(texts, written, strict=True)
    ]


def _share(counted: Sequence[tuple[int, int]]) -> float:
    alike, lost = (sum(numbers) for numbers in zip(*counted, strict=True))
    return alike / (alike + lost) if alike + lost else 1.0


if __name__ == "__main__":
    main()
