"""The demonstration behind ``make demo``: pack the tiny model, then let llama.cpp write with it.

Runs anywhere the package is installed; needs neither the network nor the source tree.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from medllm_pack.parity.llamacpp import Model

PROMPTS = ("Paciente", "EVOLUÇÃO MÉDICA", "Exame físico:")
TOKENS = 60


def main() -> None:
    """Build ``tiny``, show the result, write a note with a built variant."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("dist/tiny"))
    out = parser.parse_args().out
    quants = "f16,q8_0,q4_k_m"
    _command("build", "tiny", "--quant", quants, "--out", str(out), "--force")
    _command("inspect", str(out))
    variant = next(out.glob("*-Q4_K_M.gguf"))
    print(f"\n{variant.name} continues, through llama.cpp (made-up text of no medical meaning):\n")
    for prompt in PROMPTS:
        print(f"  [{prompt}]{write(variant, prompt)}\n")


def write(model: Path, prompt: str, *, tokens: int = TOKENS) -> str:
    """Return the greedy continuation of a prompt by a GGUF file."""
    with Model(model) as llama:
        return " ".join(llama.write(prompt, tokens=tokens).split("\n"))


def _command(*arguments: str) -> None:
    print(f"$ medllm-pack {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "medllm_pack", *arguments], check=True)
    print(flush=True)


if __name__ == "__main__":
    main()
