"""Measure the tiny model on the held-out texts, let it write, and draw its losses.

Writes ``results.json`` (perplexities), ``samples.txt`` (continuations of base and base with
adapter) and ``losses.svg``. It knows nothing about training; `train.py` calls it at the end.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections import defaultdict
from pathlib import Path

import sentencepiece
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

LENGTH = 256
TEXTS = ("geral_teste", "clinico_teste")
PROMPTS = (
    "Paciente",
    "EVOLUÇÃO MÉDICA",
    "Exame físico:",
    "Sumário de alta",
    "Ao exame",
    "Evolução",
    "Prescrição:",
    "A cidade",
)
NEW_TOKENS = 90
SAMPLE_SEED = 7

Curve = list[tuple[int, float]]


def sequences(documents: list[list[int]], length: int) -> torch.Tensor:
    """Return documents, joined and cut, as (sequences, length) tokens; the rest is left out."""
    stream = [token for document in documents for token in document]
    count = len(stream) // length
    return torch.tensor(stream[: count * length]).view(count, length)


@torch.no_grad()
def mean_loss(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return the mean loss per token, in nats, in the arithmetic of the model's weights."""
    model.eval()
    total = 0.0
    for part in torch.split(tokens, 8):  # (8, length): bounds the memory of the activations
        total += model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
    return total / len(tokens)


@torch.no_grad()
def continuation(model: LlamaForCausalLM, prompt: list[int], temperature: float) -> list[int]:
    """Return up to NEW_TOKENS tokens after ``prompt``; temperature 0 takes the likeliest."""
    torch.manual_seed(SAMPLE_SEED)
    tokens = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        scores = model(input_ids=tokens, use_cache=False).logits[0, -1]
        if temperature:
            new = torch.multinomial(torch.softmax(scores / temperature, 0), 1)
        else:
            new = scores.argmax().view(1)
        if new.item() == 2:
            break
        tokens = torch.cat([tokens, new.view(1, 1)], dim=1)
    return [int(token) for token in tokens[0]]


def write(folder: Path, losses: Path) -> None:
    """Write results.json, samples.txt and losses.svg into ``folder``."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "base/tokenizer.model"))
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    results = {"base": _perplexities(base, folder, pieces)}
    samples = {"base": _samples(base, pieces)}
    merged = PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload()
    results["base+adapter"] = _perplexities(merged, folder, pieces)
    samples["base+adapter"] = _samples(merged, pieces)
    _replace(folder / "results.json", json.dumps(results, indent=2) + "\n")
    _replace(folder / "samples.txt", _side_by_side(samples))
    _replace(folder / "losses.svg", draw(read_curves(losses)))


def _perplexities(
    model: LlamaForCausalLM, folder: Path, pieces: sentencepiece.SentencePieceProcessor
) -> dict[str, float]:
    found = {}
    for name in TEXTS:
        documents = (folder / "texts" / f"{name}.txt").read_text(encoding="utf-8").strip()
        tokens = [[1, *pieces.encode(text), 2] for text in documents.split("\n\n")]
        found[name] = round(math.exp(mean_loss(model, sequences(tokens, LENGTH))), 3)
    return found


def _samples(
    model: LlamaForCausalLM, pieces: sentencepiece.SentencePieceProcessor
) -> dict[tuple[str, float], str]:
    return {
        (prompt, heat): pieces.decode(continuation(model, [1, *pieces.encode(prompt)], heat))
        for prompt in PROMPTS
        for heat in (0.0, 0.2)
    }


def _side_by_side(samples: dict[str, dict[tuple[str, float], str]]) -> str:
    blocks = []
    for prompt, heat in samples["base"]:
        way = f"temperature {heat}" if heat else "greedy"
        texts = [f"--- {name}\n{texts[prompt, heat]}" for name, texts in samples.items()]
        blocks.append("\n".join([f"=== {prompt!r}, {way}", *texts]))
    return "\n\n".join(blocks) + "\n"


def read_curves(path: Path) -> dict[tuple[str, str], Curve]:
    """Return the curves of a losses file, by model and split."""
    curves: dict[tuple[str, str], Curve] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            curves[row["model"], row["split"]].append((int(row["step"]), float(row["loss"])))
    return dict(curves)


COLOURS = {"train": "#888888", "geral_teste": "#1b7837", "clinico_teste": "#b2182b"}
PANEL, HEIGHT, MARGIN, TOP_LOSS = 340, 220, 40, 7.0


def draw(curves: dict[tuple[str, str], Curve]) -> str:
    """Return the curves as SVG, one panel for each model."""
    models = list(dict.fromkeys(model for model, _ in curves))
    width = len(models) * (PANEL + MARGIN) + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + 80}"'
        ' font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for index, model in enumerate(models):
        chosen = {split: curve for (name, split), curve in curves.items() if name == model}
        parts += _panel(model, chosen, MARGIN + index * (PANEL + MARGIN))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(model: str, curves: dict[str, Curve], left: int) -> list[str]:
    last = max(step for curve in curves.values() for step, _ in curve)
    parts = [f'<text x="{left}" y="20" font-weight="bold">{model}: loss by step</text>']
    for level in range(8):
        y = _height(level)
        parts.append(f'<path d="M{left} {y:.1f}h{PANEL}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{level}</text>')
    for row, (split, curve) in enumerate(curves.items()):
        points = " ".join(f"{left + PANEL * x / last:.1f},{_height(y):.1f}" for x, y in curve)
        colour = COLOURS[split]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        parts.append(
            f'<text x="{left + 120 * row}" y="{HEIGHT + 70}" fill="{colour}">'
            f"{split} {curve[-1][1]:.2f}</text>"
        )
    parts.append(f'<text x="{left + PANEL}" y="{HEIGHT + 48}" text-anchor="end">{last}</text>')
    return parts


def _height(loss: float) -> float:
    return 30 + HEIGHT * (1 - min(loss, TOP_LOSS) / TOP_LOSS)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)
