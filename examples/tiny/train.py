"""Train the tiny model: its tokenizer, its base and its LoRA adapter.

The base is a real LLaMA in small, trained on the general texts only; the adapter follows the
recipe of Clinical-BR-LlaMA-2-7B (r 8, alpha 16, dropout 0.1, query and value projections, 16
bit) on the clinical texts. This script knows nothing about GGUF; it needs torch, transformers,
peft, sentencepiece and about 1.5 GB of memory.

    python corpus.py && python train.py         # everything, about 35 minutes on one CPU core
    python train.py --only adapter              # one stage, on what is there

On one kind of CPU, with the same versions and one thread, the same files come out again.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import sentencepiece
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
SEED = 20241
LENGTH = 256  # tokens in a training sequence
BATCH = 4  # sequences in a step
VOCABULARY = 1024
STAGES = ("tokenizer", "base", "phrases", "adapter", "report")
BASE_NAME = "medllm-pack/tiny-base"

# In the words of LLaMA-2's own config.json, which old and new readers understand alike.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    # Every row length is a multiple of 256, the super-block of llama.cpp's k-quants.
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    # llama.cpp's quantization mixes branch on n_layer/8 and n_layer/16.
    "num_hidden_layers": 16,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
TOKENIZER = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 1024,
    "pad_token": None,
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Pieces of their own, whatever the texts of the day contain.
REQUIRED = "áàâãäéêëíïóôõöúüçñÁÀÂÃÉÊÍÓÔÕÚÜÇºª°µ²³±≥≤—–“”"


@dataclass(frozen=True)
class Course:
    """One training: what is learned from which texts, for how long and how fast."""

    name: str
    texts: tuple[str, ...]
    steps: int
    rate: float
    betas: tuple[float, float]
    decay: float
    seed: int
    warmup: int = 40
    log_every: int = 100


BASE = Course("base", ("geral_treino",), 1200, 2.5e-3, (0.9, 0.95), 0.02, SEED)
# The second course of the base: general text again, and lists of the clinic's phrases.
PHRASES = Course(
    "phrases", ("geral_treino", *["geral_frases"] * 5), 400, 1.5e-3, (0.9, 0.95), 0.02, SEED + 2
)
ADAPTER = Course("adapter", ("clinico_treino",), 1000, 8e-3, (0.9, 0.999), 0.01, SEED + 1)


def read_documents(name: str) -> list[str]:
    """Return the documents of a text, which a blank line separates."""
    text = (HERE / "texts" / f"{name}.txt").read_text(encoding="utf-8")
    return text.strip().split("\n\n")


def train_tokenizer(out: Path) -> None:
    """Train the SentencePiece model on both domains, by LLaMA-2's conventions."""
    texts = [text for name in (*BASE.texts, *ADAPTER.texts) for text in read_documents(name)]
    # SentencePiece never sees a line break: it stays a byte piece, <0x0A>, as in LLaMA-2.
    lines = [line for text in texts for line in text.split("\n")]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),  # an input file would leave its path in the model
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=1.0,
        required_chars=REQUIRED,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (out / "tokenizer.model").write_bytes(model.getvalue())
    _write_json(out / "tokenizer_config.json", TOKENIZER)
    _write_json(out / "special_tokens_map.json", SPECIAL_TOKENS)


def read_tokens(name: str) -> list[list[int]]:
    """Return the documents of a text as tokens, each between <s> and </s>."""
    model = str(HERE / "base" / "tokenizer.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=model)
    return [[1, *pieces.encode(text), 2] for text in read_documents(name)]


def batches(documents: list[list[int]], seed: int) -> Iterator[torch.Tensor]:
    """Yield (BATCH, LENGTH) tokens without end, the documents shuffled anew in each round."""
    rng = random.Random(seed)
    stream: list[int] = []
    while True:
        for document in rng.sample(documents, len(documents)):
            stream += document
            if len(stream) >= BATCH * LENGTH:
                yield torch.tensor(stream[: BATCH * LENGTH]).view(BATCH, LENGTH)
                stream = stream[BATCH * LENGTH :]


def new_base(seed: int) -> LlamaForCausalLM:
    """Return an untrained base in float32."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**CONFIG, "torch_dtype": "float32"}))
    # Two branches a block are added up: smaller ends keep the sum of 16 blocks near one.
    shrink = 1 / math.sqrt(2 * CONFIG["num_hidden_layers"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(shrink)
    return model


def new_adapter(seed: int) -> PeftModel:
    """Return the saved base, frozen in bfloat16, under an untrained adapter in float32."""
    base = LlamaForCausalLM.from_pretrained(HERE / "base", dtype=torch.bfloat16)
    torch.manual_seed(seed)
    recipe = LoraConfig(
        r=8,
        lora_alpha=16,
        lora_dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, recipe)
    assert isinstance(model, PeftModel)
    return model


def learn(model: torch.nn.Module, course: Course, log: Log) -> None:
    """Run a course: AdamW, bfloat16 arithmetic, a short warm-up and a cosine down to a tenth."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=course.rate, betas=course.betas, weight_decay=course.decay
    )
    plan = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(course))
    started, recent = time.monotonic(), []
    documents = [tokens for name in course.texts for tokens in read_tokens(name)]
    for step, tokens in zip(
        range(1, course.steps + 1), batches(documents, course.seed), strict=False
    ):
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        plan.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        if step % course.log_every == 0 or step in (1, course.steps):
            log.write(course.name, step, "train", sum(recent) / len(recent))
            log.held_out(course.name, step, model)
            print(f"{course.name} {step} {time.monotonic() - started:.0f} s", flush=True)
            recent = []


def _schedule(course: Course) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < course.warmup:
            return (step + 1) / course.warmup
        done = (step - course.warmup) / max(1, course.steps - course.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor


class Log:
    """The losses of a run, a row at a time: training, and both held-out texts."""

    def __init__(self, path: Path, sample: int = 8) -> None:
        """Open ``path``; ``sample`` is how many held-out sequences are measured on the way."""
        self._path = path
        self._texts = {
            name: report.sequences(read_tokens(name), LENGTH)[:sample]
            for name in ("geral_teste", "clinico_teste")
        }

    def write(self, model: str, step: int, split: str, loss: float) -> None:
        """Append one row."""
        print(f"{model} {step} {split} {loss:.4f}", flush=True)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow([model, step, split, f"{loss:.4f}"])

    def held_out(self, model: str, step: int, network: torch.nn.Module) -> None:
        """Measure the first sequences of both held-out texts."""
        for name, tokens in self._texts.items():
            self.write(model, step, name, report.mean_loss(network, tokens))


def train_base(out: Path, course: Course, log: Log) -> None:
    """Train the base from nothing and save it."""
    model = new_base(course.seed)
    learn(model, course, log)
    save_base(model, out)


def train_phrases(out: Path, course: Course, log: Log) -> None:
    """Train the saved base further and save it in its place."""
    model = LlamaForCausalLM.from_pretrained(HERE / "base", dtype=torch.float32)
    learn(model, course, log)
    save_base(model, out)


def save_base(model: LlamaForCausalLM, out: Path) -> None:
    """Save a base as one float16 file with its configuration."""
    weights = {name: weight.half().contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    _write_json(out / "config.json", CONFIG)
    _write_json(out / "generation_config.json", GENERATION)


def train_adapter(out: Path, course: Course, log: Log) -> None:
    """Train the adapter and save it in PEFT's form, its tensors in float16."""
    model = new_adapter(course.seed)
    learn(model, course, log)
    # The name of a model, not the folder that this run happened to read.
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        recipe = json.loads(Path(folder, "adapter_config.json").read_bytes())
        weights = load_file(f"{folder}/adapter_model.safetensors")
    recipe["target_modules"].sort()  # a set in PEFT: its order changes from run to run
    _write_json(out / "adapter_config.json", recipe)
    halves = {name: weight.half() for name, weight in weights.items()}
    save_file(halves, out / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def install(stage: Path, target: Path) -> None:
    """Move the files of ``stage`` into ``target``, each in one step."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(stage.iterdir()):
        file.chmod(0o644)  # safetensors writes for its owner alone
        os.replace(file, target / file.name)


def run_stage(name: str, make: Callable[[Path], None], folder: str) -> None:
    """Make the files of a stage aside and install them when all are there."""
    started = time.monotonic()
    # Beside the target, because a rename cannot cross file systems.
    with tempfile.TemporaryDirectory(dir=HERE, prefix=".stage-") as stage:
        make(Path(stage))
        install(Path(stage), HERE / folder)
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Run the stages asked for, in their order."""
    parser = argparse.ArgumentParser(description="train the tiny model")
    parser.add_argument("--only", choices=STAGES)
    parser.add_argument("--log", type=Path, default=HERE / "losses.csv", help="losses to extend")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a sum split over threads may round differently
    torch.use_deterministic_algorithms(True)

    def asked(stage: str) -> bool:
        return options.only in (None, stage)

    if asked("tokenizer"):
        run_stage("tokenizer", train_tokenizer, "base")
    if asked("base"):
        options.log.write_text("model,step,split,loss\n", encoding="utf-8")
        run_stage("base", lambda out: train_base(out, BASE, Log(options.log)), "base")
    if asked("phrases"):
        run_stage("phrases", lambda out: train_phrases(out, PHRASES, Log(options.log)), "base")
    if asked("adapter"):
        run_stage("adapter", lambda out: train_adapter(out, ADAPTER, Log(options.log)), "adapter")
    if asked("report"):
        report.write(HERE, options.log)


if __name__ == "__main__":
    main()
