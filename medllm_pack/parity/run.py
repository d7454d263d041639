"""``check_pack``: climb the ladder for every variant of a pack and write down the verdict.

All rungs are climbed where possible; the first check that fails names where things went wrong. The
rungs that need no texts come first, then llama.cpp writes, then the reference runs once over
everything, then every variant is compared with it.

Memory: what the reference needs. Disk: the logits of all texts, twice, in files without a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from medllm_pack import files, gpu
from medllm_pack.errors import (
    CheckFailedError,
    GGUFError,
    ModelfileError,
    SourceError,
    WorkerError,
    shown,
)
from medllm_pack.gguf.reader import GGUFFile, read_gguf
from medllm_pack.gpu import Choice
from medllm_pack.limits import Departure, Limits
from medllm_pack.ollama.server import Server
from medllm_pack.pack import papers
from medllm_pack.pack.manifest import Document, read_manifest, recipe_of
from medllm_pack.pack.sums import SIGNATURE
from medllm_pack.parity import record
from medllm_pack.parity.cache import Cache, model_key
from medllm_pack.parity.checks import CAUSES, Check, TensorError, Verdict, broken, skipped
from medllm_pack.parity.header import check_settings, check_variant
from medllm_pack.parity.jobs import Jobs
from medllm_pack.parity.measures import Spread
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.original import Original, Sources, find_original, require_extra
from medllm_pack.parity.predictions import Written, check_generation, check_logits, measure
from medllm_pack.parity.prompts import check_template, read_beside
from medllm_pack.parity.runtime import Runtime
from medllm_pack.parity.seen import EXACT, Stored
from medllm_pack.parity.served import Served, check_served, find_served
from medllm_pack.parity.tensors import Found, check_tensors
from medllm_pack.parity.texts import Texts, shipped_texts
from medllm_pack.parity.tokens import (
    STRINGS,
    Tokenizer,
    check_ids,
    check_vocabulary,
)
from medllm_pack.parity.ways import Reference, Way
from medllm_pack.progress import SILENT, Reporter

NOTES = 16  # texts that are used
_LEAST_TOKENS = 100
_PROMPTS, _PROMPT_TOKENS, _NEW_TOKENS = 4, 24, 24


@dataclass(frozen=True)
class Result:
    """What a check of a pack found.

    Attributes:
        folder: the pack.
        texts: what was predicted.
        verdicts: one a variant, in the order of the pack.
        document: the content of parity.json.
        way: how the reference was computed.
    """

    folder: Path
    texts: Texts
    verdicts: tuple[Verdict, ...]
    document: dict[str, Any]
    way: Way

    @property
    def passed(self) -> bool:
        """Whether every variant passed."""
        return all(verdict.passed for verdict in self.verdicts)

    def raise_if_failed(self) -> None:
        """Raise the verdict if it is no.

        Raises:
            CheckFailedError: naming the first rung that failed, and its usual cause.
        """
        for verdict in self.verdicts:
            if check := verdict.failed:
                raise CheckFailedError(
                    f"{verdict.quant} is not the model it was made from: {check.name}: "
                    f"{check.found}. Usual cause: {CAUSES[check.rung]}"
                )


@dataclass
class _Climb:
    """A variant on its way up."""

    quant: str
    path: Path
    sha256: str
    entry: dict[str, Any]  # of pack.json
    header: GGUFFile | None = None
    checks: list[Check] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    unwritten: str = ""  # why there is nothing
    figures: dict[str, float] = field(default_factory=dict)
    spread: Spread | None = None
    tensors: tuple[TensorError, ...] = ()
    departures: tuple[Departure, ...] = ()

    @property
    def verdict(self) -> Verdict:
        size = self.header.size if self.header else None
        return Verdict(
            self.quant, tuple(self.checks), self.figures, self.spread, self.tensors, size,
            self.departures,
        )  # fmt: skip


def check_pack(
    folder: Path,
    *,
    texts: Texts | None = None,
    sources: Sources | None = None,
    runtime: Runtime | None = None,
    device: Choice = "auto",
    ollama: str | None = None,
    cache: Path | None = None,
    report: Reporter = SILENT,
) -> Result:
    """Check every variant of a pack against the model it was made from.

    Args:
        folder: the pack; the verdict is written into it.
        texts: what is predicted; held-out notes of the tiny model if None.
        sources: where base, adapter or merged weights are now, if not where pack.json says.
        runtime: how llama.cpp is run; all processors of this process if None.
        device: where the reference is computed; ``auto``: on a GPU if torch has one that works.
        ollama: a model on an Ollama server that is checked, too.
        cache: folder where the reference's logits are kept; not for texts of a user.
        report: listener.

    Raises:
        DeviceError: if the device is missing, fails, or has no room for the reference.
        MedllmError: if the check could not be made; nothing is written then.
    """
    require_extra()
    manifest = read_manifest(folder)
    papers.derived(manifest)  # a pack.json that could not be written again is refused now
    record.require_place(folder)
    runtime = runtime or Runtime()
    runtime.require()
    gpu.chosen(device)
    climbs = [_climb(folder, entry) for entry in manifest["variants"]]
    digests = {climb.quant: climb.sha256 for climb in climbs}
    served = find_served(Server.from_environment(), ollama, digests) if ollama else None
    original = find_original(manifest, sources or Sources(), report=report)
    reference = Reference(original, device, report=report)
    ladder = _Ladder(original, reference, runtime, served, manifest, report)
    texts = texts or shipped_texts(count=NOTES)
    with Nameless() as place, ExitStack() as stack:
        if cache is not None and texts.sha256 is not None:  # what users wrote leaves no trace
            ladder.cache = Cache(cache, lambda: model_key(manifest, reference.way.document()))
            stack.enter_context(ladder.cache.used())
        ladder.climb(climbs, texts, place)
    verdicts = tuple(climb.verdict for climb in climbs)
    if (folder / SIGNATURE).exists():
        report.notice(f"{SIGNATURE} is removed, since it cannot hold for the verdict; "
                      "sign the pack again")  # fmt: skip
    how = reference.way.document(), runtime.document()
    record.write(folder, manifest, texts, verdicts, *how)
    return Result(folder, texts, verdicts, record.describe(texts, verdicts, *how), reference.way)


def _climb(folder: Path, entry: dict[str, Any]) -> _Climb:
    name = entry["file"]
    if Path(name).name != name:
        raise SourceError(f"pack.json names the file {shown(name)}, which is not in the pack")
    if "types" not in entry:
        raise SourceError("pack.json lacks 'types'; build the pack again")
    return _Climb(entry["quant"], folder / name, entry["sha256"], entry)


def _require_tokens(sequences: Sequence[Sequence[int]]) -> None:
    """Refuse texts over which chance alone decides: a perplexity of five tokens says nothing."""
    tokens = sum(map(len, sequences))
    if tokens < _LEAST_TOKENS:
        raise SourceError(
            f"the texts have {tokens} tokens; a verdict needs {_LEAST_TOKENS}, better thousands: "
            "give more or longer notes"
        )


class _Ladder:
    """The rungs, in order, for all variants of a pack."""

    def __init__(
        self,
        original: Original,
        reference: Reference,
        runtime: Runtime,
        served: Served | None,
        manifest: Document,
        report: Reporter,
    ) -> None:
        matrix = manifest["importance"] is not None
        self.limits = Limits(recipe_of(manifest).parity, matrix=matrix)
        self.original, self.runtime, self.report = original, runtime, report
        self.reference = reference
        self.served, self.template = served, str(manifest["template"]["sha256"])
        self.tokenizer = Tokenizer(original)
        self.config = original.transformers_config()
        self.cache: Cache | None = None

    def climb(self, climbs: Sequence[_Climb], texts: Texts, place: Nameless) -> None:
        sequences = [self.tokenizer.encode(note)[: self.runtime.ctx] for note in texts.notes]
        _require_tokens(sequences)
        for climb in climbs:
            self._look_at_file(climb)
        sound = [climb for climb in climbs if climb.header is not None]
        for climb, found in zip(sound, self._weigh(sound), strict=True):
            self._look_inside(climb, found)
            self._let_write(climb, sequences)
        written = [w for climb in sound for w in climb.written]
        everything = [*sequences, *(w.whole for w in written)]
        reference = self._refer(everything, place)
        ends = iter(reference[len(sequences) :])
        for climb in sound:
            self._compare_logits(climb, sequences, reference[: len(sequences)])
            self._compare_writing(climb, [next(ends) for _ in climb.written])
            self._compare_served(climb)
            self._look_at_limits(climb)

    def _look_at_limits(self, climb: _Climb) -> None:
        """Note which of the limits that counted are the recipe's."""
        kinds = [tensor.type for tensor in climb.tensors if tensor.type not in EXACT]
        rungs = {check.rung for check in climb.checks if check.passed is not None}
        climb.departures = self.limits.departures(climb.quant, kinds=kinds, rungs=rungs)

    def _refer(self, sequences: Sequence[Sequence[int]], place: Nameless) -> list[Path]:
        """Return the reference's logits, from the cache where it has them."""
        self.reference.plan(sequences)
        compute = partial(self.reference.logits, place=place)
        return self.cache.logits(sequences, compute) if self.cache else compute(sequences)

    def _look_at_file(self, climb: _Climb) -> None:
        self.report.step(f"digest of {climb.path.name}")
        try:
            climb.header = read_gguf(climb.path)
        except GGUFError as error:
            climb.checks.append(broken("file.header", str(error)))
            return
        same = files.sha256(climb.path) == climb.sha256
        detail = (
            "the file is the one that was built"
            if same
            else (f"{climb.path.name} is not the file that pack.json names")
        )
        climb.checks.append(Check("file.digest", int(not same), "= 0 differ", same, detail))
        climb.checks.append(check_variant(climb.header, climb.entry))

    def _weigh(self, climbs: Sequence[_Climb]) -> list[Found]:
        """Compare all weights of all files with the model's, which are read once."""
        stored = [Stored(climb.path, climb.header) for climb in climbs if climb.header]
        threads = self.runtime.threads
        return check_tensors(
            stored, self.original, self.limits, threads=threads, report=self.report
        )

    def _look_inside(self, climb: _Climb, found: Found) -> None:
        assert climb.header is not None
        metadata = climb.header.metadata
        climb.checks.append(check_settings(metadata, self.original))
        checks, climb.tensors = found
        climb.checks += checks
        climb.checks.append(check_vocabulary(metadata, self.tokenizer))
        climb.checks.append(self._tokenize(climb))
        climb.checks += self._render(climb)

    def _tokenize(self, climb: _Climb) -> Check:
        if not self.tokenizer.comparable:
            reason = "add_prefix_space is off, which SentencePiece alone cannot follow"
            return skipped("tokens.ids", reason)
        self.report.step(f"tokens of {climb.quant}")
        try:
            ids = self._jobs(climb).tokenize(STRINGS)
        except WorkerError as error:
            return broken("tokens.ids", str(error))
        return check_ids(ids, self.tokenizer)

    def _render(self, climb: _Climb) -> list[Check]:
        folder, entry, ask = climb.path.parent, climb.entry, self._jobs(climb).prompts
        return check_template(folder, entry, self.template, self.tokenizer, ask)

    def _compare_served(self, climb: _Climb) -> None:
        """Ask the server, if it is this variant that it holds."""
        if self.served is None or self.served.sha256 != climb.sha256:
            return
        self.report.step(f"{climb.quant} as served")
        try:
            modelfile = read_beside(climb.path.parent, climb.entry)
            write = self._jobs(climb).write
            climb.checks += check_served(
                self.served, climb.quant, modelfile, self.tokenizer, write, self.limits
            )
        except (SourceError, ModelfileError) as error:
            climb.checks.append(broken("served", str(error)))

    def _let_write(self, climb: _Climb, sequences: Sequence[Sequence[int]]) -> None:
        """Let llama.cpp continue the first texts; the reference reads it later."""
        if self.limits.greedy_tie(climb.quant) is None:  # a quantized one may well write otherwise
            return
        self.report.step(f"{climb.quant} writes")
        prompts = [list(ids[:_PROMPT_TOKENS]) for ids in sequences[:_PROMPTS]]
        try:
            written = self._jobs(climb).continue_(prompts, _NEW_TOKENS)
        except WorkerError as error:
            climb.unwritten = str(error)
            return
        climb.written = [Written(p, i) for p, i in zip(prompts, written, strict=True)]

    def _compare_logits(
        self,
        climb: _Climb,
        sequences: Sequence[Sequence[int]],
        reference: Sequence[Path],
    ) -> None:
        self.report.step(f"logits of {climb.quant}")
        with Nameless() as place:
            try:
                paths = self._jobs(climb).logits(sequences, place)
            except WorkerError as error:
                climb.checks.append(broken("logits", str(error)))
                return
            climb.figures, climb.spread = measure(reference, paths, sequences)
        climb.checks += check_logits(climb.quant, climb.figures, self.limits)

    def _jobs(self, climb: _Climb) -> Jobs:
        return Jobs(climb.path, self.config, self.runtime)

    def _compare_writing(self, climb: _Climb, reference: Sequence[Path]) -> None:
        if climb.unwritten:
            climb.checks.append(broken("generation", climb.unwritten))
        elif (tie := self.limits.greedy_tie(climb.quant)) is not None and climb.written:
            least = self.limits.greedy_agreement
            climb.checks.append(check_generation(reference, climb.written, tie=tie, least=least))
