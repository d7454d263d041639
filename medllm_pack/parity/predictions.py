"""Rungs *logits* and *generation*: what a file says next, against what the reference says.

The reference runs once, over the texts and over what each unquantized variant wrote: whether it
would have written the same greedily can be read from one pass, without generating anything.

Knows nothing of where the logits come from. Memory: the logits of one text, a few times over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medllm_pack.limits import Limits
from medllm_pack.parity.checks import Check, at_least, at_most, skipped
from medllm_pack.parity.measures import Spread, compare, spread, summarize

Sequences = Sequence[Sequence[int]]

_LEAST_CLEAR = 100  # tokens


@dataclass(frozen=True)
class Written:
    """A prompt and what a variant wrote after it, as ids."""

    prompt: Sequence[int]
    ids: Sequence[int]

    @property
    def whole(self) -> list[int]:
        """Prompt and continuation."""
        return [*self.prompt, *self.ids]


def measure(
    reference: Sequence[Path], variant: Sequence[Path], sequences: Sequences
) -> tuple[dict[str, float], Spread]:
    """Return the key figures of a variant over all texts, and how its divergences are spread."""
    distances = [
        compare(np.load(ours), np.load(theirs), ids)
        for ours, theirs, ids in zip(reference, variant, sequences, strict=True)
    ]
    return summarize(distances), spread(distances)


def check_logits(quant: str, figures: Mapping[str, float], limits: Limits) -> list[Check]:
    """Compare the figures of a variant with the limits of its type."""
    allowed = limits.logits(quant)
    n = f"over {figures['tokens']} tokens"
    ratio, error = figures["ppl_ratio"], figures["ppl_ratio_error"]
    perplexities = f"{figures['ppl']:.6g} against {figures['ppl_reference']:.6g}"
    return [
        at_most("logits.kld_mean", figures["kld_mean"], allowed.kld_mean, f"nats, {n}"),
        at_most("logits.kld_p99", figures["kld_p99"], allowed.kld_p99,
                f"nats; median {figures['kld_median']:.3g}, largest {figures['kld_max']:.3g}"),
        _check_top(figures, allowed.top1_clear),
        Check("logits.ppl_ratio", ratio, f"1 ± {allowed.ppl_ratio:g}",
              abs(ratio - 1) <= allowed.ppl_ratio,
              f"perplexity {perplexities}, standard error of the ratio {error:.2g}"),
    ]  # fmt: skip


def _check_top(figures: Mapping[str, float], least: float) -> Check:
    """Compare the likeliest tokens, unless they are so few that a share of them says nothing."""
    name, clear = "logits.top1_clear", figures["tokens_clear"]
    if clear < _LEAST_CLEAR:
        return skipped(name, f"the reference is clear about {clear} tokens only")
    detail = (f"same likeliest token where the reference is clear ({clear} tokens; "
              f"everywhere {figures['top1']:.2%})")  # fmt: skip
    return at_least(name, figures["top1_clear"], least, detail)


def check_generation(
    reference: Sequence[Path], written: Sequence[Written], *, tie: float, least: float
) -> Check:
    """Say how many greedy tokens the reference would have written too.

    Args:
        reference: its logits over each prompt and what was written after it.
        written: by the variant.
        tie: what a token's logit may lack of the reference's best.
        least: share of tokens that must agree.
    """
    agreeing = [_agreeing(np.load(p), w, tie=tie) for p, w in zip(reference, written, strict=True)]
    total = sum(len(w.ids) for w in written)
    share = sum(agreeing) / total if total else 1.0
    whole = sum(n == len(w.ids) for n, w in zip(agreeing, written, strict=True))
    detail = f"{sum(agreeing)} of {total} tokens, {whole} of {len(written)} continuations whole"
    return at_least("generation.greedy", share, least, detail)


def _agreeing(logits: NDArray[np.float32], written: Written, *, tie: float) -> int:
    """Count the tokens until the first that the reference would not have written."""
    start = len(written.prompt) - 1
    for i, id_ in enumerate(written.ids):
        scores = logits[start + i]
        if scores[id_] < scores.max() - tie:
            return i
    return len(written.ids)
