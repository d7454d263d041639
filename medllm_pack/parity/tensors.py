"""Rungs *merge* and *weights*: every tensor of GGUF files against the fine-tuned model's.

Knows nothing of llama.cpp as a runtime, and leaves arithmetic to seen.py. Memory: see there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medllm_pack.limits import Limits
from medllm_pack.parity.checks import Check, TensorError, at_least, at_most, broken, skipped
from medllm_pack.parity.original import Original
from medllm_pack.parity.seen import Figures, Stored, look, look_at
from medllm_pack.parity.wanted import Wanted
from medllm_pack.progress import Reporter

_ALIKE = 0.5  # correlation above which a tensor is the base's with something added
_CHANGED = 0.01  # share of values above which a tensor was changed, not damaged

Found = tuple[list[Check], tuple[TensorError, ...]]


def check_tensors(
    files: Sequence[Stored],
    original: Original,
    limits: Limits,
    *,
    threads: int,
    report: Reporter,
) -> list[Found]:
    """Return the checks of the rungs *merge* and *weights*, and each tensor's error, of each file.

    Args:
        files: all files of the model; its own weights are read once for all of them.
        original: the model.
        limits: of types.
        threads: tensors looked at at once.
        report: listener; a step counts bytes of the files.
    """
    wanted = Wanted(original)
    problems = {file.path: list(file.mismatches(wanted)) for file in files}
    whole = [file for file in files if not problems[file.path]]
    seen = _look(whole, wanted, limits, threads=threads, report=report)
    return [
        _mismatched(problems[file.path])
        if problems[file.path]
        else _Judge(file, wanted, limits).judge(seen[file.path])
        for file in files
    ]


def _look(
    files: Sequence[Stored], wanted: Wanted, limits: Limits, *, threads: int, report: Reporter
) -> dict[Path, list[Figures]]:
    """Return what was seen of each file's tensors, in the order of the file."""
    if not files:
        return {}
    seen: dict[Path, dict[str, Figures]] = {file.path: {} for file in files}
    total = sum(slot.nbytes for file in files for slot in file.header.tensors)
    report.step("weights", total_bytes=total)
    for name, figures in look(files, wanted, limits, threads=threads):
        for file, found in zip(files, figures, strict=True):
            seen[file.path][name] = found
            report.advance(file.slots[name].nbytes)
    return {file.path: [seen[file.path][name] for name in file.slots] for file in files}


def _mismatched(problems: Sequence[str]) -> Found:
    return [broken("weights.tensors", _first(problems))], ()


@dataclass(frozen=True)
class _Judge:
    """Judges what was seen of a file, and looks again at what is wrong."""

    file: Stored
    wanted: Wanted
    limits: Limits

    def judge(self, found: Sequence[Figures]) -> Found:
        errors = tuple(TensorError(f.name, f.kind, f.rmse, f.cosine, f.worst) for f in found)
        return [self._merge(found), *self._weights(found)], errors

    def _merge(self, found: Sequence[Figures]) -> Check:
        """Say whether exactly the adapter's targets hold the adapter, at PEFT's scale."""
        pairs = len(self.wanted.pairs)
        if not pairs:
            return skipped("merge.pairs", "the pack was made from weights that were already merged")
        targets = [self._in_best_order(f) for f in found if f.share is not None]
        known = [f for f in targets if f.right or f.alike > _ALIKE]
        proven = [f for f in known if self._holds_adapter(f)]
        problems = [_merge_problem(f) for f in known if f not in proven]
        problems += [
            f"{f.name} was changed, and the adapter does not target it"
            for f in found
            if f.share is None and f.exact and f.wrong > _CHANGED * f.n and f.alike > _ALIKE
            and len(self.file.slots[f.name].shape) > 1
        ]  # fmt: skip
        limit = f"= {pairs} pairs"
        if problems:
            return Check("merge.pairs", len(proven), limit, False, _first(problems))
        if len(proven) < pairs:
            detail = (f"{pairs - len(proven)} targets are not the base's weights with anything "
                      "added; see weights")  # fmt: skip
            return Check("merge.pairs", len(proven), limit, None, detail)
        shares = [f.share for f in proven if f.share is not None]
        detail = f"each target holds {min(shares):.4f} to {max(shares):.4f} of scale · (B·A)"
        return Check("merge.pairs", len(proven), limit, True, detail)

    def _in_best_order(self, seen: Figures) -> Figures:
        """Return the figures in the row order that fits; the order is the next rung's question."""
        if seen.right or seen.alike > _ALIKE:
            return seen
        other = self._look_at(seen.name, permuted=False)
        return other if other.alike > seen.alike else seen

    def _holds_adapter(self, seen: Figures) -> bool:
        assert seen.share is not None
        allowed = self.limits.merge(exact=seen.exact)
        return (seen.exact and seen.wrong == 0) or abs(seen.share - 1) <= allowed + 5 * seen.noise

    def _weights(self, found: Sequence[Figures]) -> Iterator[Check]:
        """Yield the checks of the weights: exact where the type is, within limits elsewhere."""
        exact = [f for f in found if f.exact]
        wrong = [f for f in exact if not f.right]
        detail = f"{len(exact)} tensors of exact types are the reference's"
        yield Check(
            "weights.exact", sum(f.wrong for f in wrong), "= 0 values differ", not wrong,
            self._explained(wrong) or detail,
        )  # fmt: skip
        coarse = [f for f in found if not f.exact]
        if not coarse:
            return
        reasons = self._explained([f for f in _by_error(coarse) if not f.right])
        worst = _by_error(coarse)[0]
        check = at_most("weights.rmse", worst.rmse, worst.allowed.rmse, _at(worst))
        yield _with_reasons(check, reasons)
        worst = max(coarse, key=lambda f: _or_most((1 - f.cosine**2) / f.allowed.rmse**2))
        check = at_least("weights.cosine", worst.cosine, _least_cosine(worst), _at(worst))
        yield _with_reasons(check, reasons)
        worst = max(coarse, key=lambda f: _or_most(f.worst / f.allowed.worst_block))
        check = at_most("weights.worst_block", worst.worst, worst.allowed.worst_block, _at(worst))
        yield _with_reasons(check, reasons)
        worst = max(coarse, key=lambda f: _or_most(f.row / f.allowed.worst_row))
        check = at_most("weights.worst_row", worst.row, worst.allowed.worst_row, _at(worst))
        yield _with_reasons(check, reasons)

    def _explained(self, wrong: Sequence[Figures]) -> str:
        """Explain the first tensors that are wrong and count the rest."""
        said = [self._explain(seen) for seen in wrong[:3]]
        if len(wrong) > len(said):
            said.append(f"and {len(wrong) - len(said)} more tensors")
        return "; ".join(said)

    def _explain(self, seen: Figures) -> str:
        """Say what a wrong tensor is instead."""
        if not math.isfinite(seen.rmse):
            return f"{seen.name} holds values that are no finite numbers"
        if seen.cosine == 0.0:
            return f"{seen.name} is all zero"
        if self._look_at(seen.name, permuted=False).right:
            return f"{seen.name} has its rows in Hugging Face's order, not llama.cpp's"
        if other := self._twin(seen.name):
            return f"{seen.name} holds {other}"
        if seen.exact:
            return f"{seen.name}: {seen.wrong} of {seen.n} values differ"
        if seen.rmse <= seen.allowed.rmse and seen.row > seen.allowed.worst_row:
            return f"{seen.name} ({seen.kind}): a row is off by {seen.row:.3g} times what it holds"
        return (f"{seen.name} ({seen.kind}): relative error {seen.rmse:.3g}, "
                f"worst weight {seen.worst:.3g}")  # fmt: skip

    def _look_at(self, name: str, *, permuted: bool) -> Figures:
        return look_at(self.file, name, self.wanted, self.limits, permuted=permuted)

    def _twin(self, name: str) -> str | None:
        """Return the tensor of another layer that a tensor holds, judged by its first rows."""
        if not name.startswith("blk."):
            return None
        _, block, kind = name.split(".", 2)
        others = (f"blk.{i}.{kind}" for i in range(self.wanted.layers) if str(i) != block)
        return next((other for other in others if self._looks_like(name, other)), None)

    def _looks_like(self, name: str, other: str) -> bool:
        source = self.wanted.sources[other]
        start, stop = next(self.wanted.groups(source))
        stored = self.file.rows(self.file.slots[name], start, stop)
        expected = self.wanted.rows(source, start, stop).exact
        norms = math.sqrt(float((stored**2).sum() * (expected**2).sum()))
        # Norms are all near one and therefore alike; only equal ones count.
        least = 1 - 1e-9 if stored.ndim == 1 else 0.99
        return norms > 0 and float((stored * expected).sum()) / norms > least


def _merge_problem(seen: Figures) -> str:
    share = seen.share or 0.0
    if abs(share) < 0.1:
        return f"{seen.name} holds nothing of the adapter (share {share:.3f})"
    return f"{seen.name} holds {share:.3f} times what the adapter adds"


def _by_error(found: Sequence[Figures]) -> list[Figures]:
    """Return the tensors with the largest errors, as measured by their limits, first."""
    return sorted(found, key=lambda f: _or_most(f.rmse / f.allowed.rmse), reverse=True)


def _or_most(value: float) -> float:
    """Return a value to sort by; one that is no number, which Python puts anywhere, as the most."""
    return math.inf if math.isnan(value) else value


def _least_cosine(seen: Figures) -> float:
    """Return the cosine of a tensor whose error is the largest that its type may have."""
    return math.sqrt(max(1 - seen.allowed.rmse**2, 0))


def _with_reasons(check: Check, reasons: str) -> Check:
    return check if check.passed or not reasons else replace(check, detail=reasons)


def _at(seen: Figures) -> str:
    return f"nearest to its limit: {seen.name} ({seen.kind})"


def _first(problems: Sequence[str]) -> str:
    return problems[0] + (f" (and {len(problems) - 1} more)" if problems[1:] else "")
