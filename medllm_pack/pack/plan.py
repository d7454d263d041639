"""The plan of a build: everything that can be known or refused before a weight is read.

From the recipe, config.json, the tokenizer and the headers of the weights alone come every output
file with its header, every tensor's place, the bytes to write, the licence's duties, and all that
is missing or wrong, at once. Nothing here reads weights or writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from gguf import GGUFValueType, Keys
from gguf import size_label as gguf_size_label

from medllm_pack import files
from medllm_pack.errors import (
    CheckpointError,
    ImportanceError,
    MedllmError,
    PlanError,
    UsageError,
    WriteError,
    shown,
)
from medllm_pack.gguf import llama
from medllm_pack.gguf.layout import Entry, Layout, lay_out
from medllm_pack.gguf.vocab import Vocabulary, read_vocabulary
from medllm_pack.limits import unknown_variants
from medllm_pack.ollama.modelfile import render
from medllm_pack.ollama.rules import survives
from medllm_pack.ollama.style import Style
from medllm_pack.pack.inputs import Inputs, choose, find_text, gather
from medllm_pack.progress import Reporter
from medllm_pack.quant.importance import Importance, read_importance
from medllm_pack.quant.mixes import Mix, ModelShape, choose_type, load_mix, requires_importance
from medllm_pack.recipe import ExpectedAdapter, ExpectedBase, Recipe
from medllm_pack.weights.lora import AdapterConfig, Merged
from medllm_pack.weights.safetensors import Checkpoint, strict_json

_P = ParamSpec("_P")
_T = TypeVar("_T")

_SPARE = 1.05  # file systems keep some room for themselves


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Attributes:
        recipe: the recipe.
        folder: where relative paths of the recipe start.
        out: folder of the pack.
        variants: names of mixes; the recipe's own if empty.
        base, adapter, merged: sources that replace the recipe's.
        imatrix: file of an importance matrix.
        template: Modelfile style that replaces the recipe's.
        replace: whether an existing pack may be replaced.
    """

    recipe: Recipe
    folder: Path
    out: Path
    variants: Sequence[str] = ()
    base: str | None = None
    adapter: str | None = None
    merged: str | None = None
    imatrix: Path | None = None
    template: str | None = None
    replace: bool = False


@dataclass(frozen=True)
class PlannedFile:
    """One variant: its mix, its file name and its layout."""

    mix: Mix
    file: str
    layout: Layout

    @property
    def quant(self) -> str:
        """The variant as users write it, such as ``q4_k_m``."""
        quant: str = self.mix.name.lower()
        return quant

    @property
    def modelfile(self) -> str:
        """Name of the Modelfile that goes with it."""
        return f"Modelfile.{self.quant}"


@dataclass(frozen=True)
class Duty:
    """A text that the licence obliges a distributor to ship; ``text`` is None if not found."""

    file: str
    text: str | None


@dataclass(frozen=True)
class Plan:
    """Everything about a build but the weights.

    Attributes:
        name: name of the result; ends in ``-custom`` where it departs from the recipe.
        inputs: local copies of what is read.
        adapter: what the adapter's configuration says; None if merged weights are packed.
        adapter_tensors: tensors of the adapter; each is used exactly once.
        files: one a variant, in the order asked for.
        deviations: how base and adapter differ from what the recipe expects.
        notices: decisions that the user should know.
        duties: texts the licence asks for.
    """

    request: Request
    name: str
    inputs: Inputs
    config: llama.LlamaConfig
    vocabulary: Vocabulary
    adapter: AdapterConfig | None
    adapter_tensors: int
    files: tuple[PlannedFile, ...]
    style: Style
    importance: Importance | None
    deviations: tuple[str, ...]
    notices: tuple[str, ...]
    duties: tuple[Duty, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.request.recipe

    @property
    def bytes_to_write(self) -> int:
        """Bytes of all GGUF files."""
        return sum(file.layout.size for file in self.files)

    @property
    def bytes_to_read(self) -> int:
        """Bytes of the weight files of the model, local or still on the Hub."""
        local = sum(
            f.size for n, f in self.inputs.model.files.items() if n.endswith(".safetensors")
        )
        return local + sum(self.inputs.model.remote.values())

    @property
    def open_duties(self) -> tuple[str, ...]:
        """Files that the licence asks for and that were not found."""
        return tuple(duty.file for duty in self.duties if duty.text is None)

    def modelfile(self, file: PlannedFile) -> str:
        """Return the text of a variant's Modelfile."""
        return _modelfile(self.style, self.recipe, self.duties, file)


class _Problems:
    """What is wrong, collected so that all of it is reported at once."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.found: list[str] = []

    def attempt(self, do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T | None:
        """Return what ``do`` returns; note its error and return None."""
        try:
            return do(*args, **kwargs)
        except UsageError:
            raise
        except MedllmError as error:
            self.found += error.lines()
            return None

    def need(self, do: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Return what ``do`` returns; without it nothing more can be said, so stop here."""
        result = self.attempt(do, *args, **kwargs)
        if result is None:
            raise PlanError(self.subject, self.found)
        return result

    def stop_if_any(self) -> None:
        """Raise what was found."""
        if self.found:
            raise PlanError(self.subject, self.found)


def make_plan(request: Request, *, report: Reporter, weights: bool = True) -> Plan:
    """Plan a build.

    Args:
        request: what was asked for.
        report: listener; downloads are its steps.
        weights: whether weights on the Hub are fetched now; ``plan`` does without.

    Raises:
        UsageError: if a variant, style or source does not exist, or options contradict.
        PlanError: with everything that is missing or wrong.
    """
    recipe = request.recipe
    mixes = _mixes(request)
    style = Style.load(request.template or recipe.template)
    sources = choose(recipe, base=request.base, adapter=request.adapter, merged=request.merged)
    problems = _Problems(recipe.name)
    problems.attempt(_check_target, request)
    problems.found += _unknown_limits(recipe, mixes)
    importance = problems.attempt(read_importance, request.imatrix) if request.imatrix else None
    inputs = problems.need(
        gather, recipe, sources, folder=request.folder, report=report, weights=weights
    )
    config = problems.need(_read_config, inputs)
    checked = problems.attempt(_check_weights, inputs, config) if inputs.has_weights else None
    adapter, n_tensors, tensor_notices = checked or (None, 0, ())
    deviations = tuple(_deviations(recipe, config, adapter))
    if recipe.strict:
        problems.found += [f"{fact}; the recipe is strict" for fact in deviations]
    vocabulary = problems.need(read_vocabulary, inputs.model_paths, rows=config.vocab)
    duties = tuple(_duties(recipe, inputs))
    name = recipe.name + ("-custom" if deviations else "")
    shape = _Shape(config, importance)
    entries = (*_general(name, recipe, config), *llama.metadata(config), *vocabulary.metadata())
    planned = problems.need(lambda: tuple(shape.plan_file(name, mix, entries) for mix in mixes))
    problems.attempt(_check_disk, request.out, planned)
    for file in planned:
        problems.attempt(_modelfile, style, recipe, duties, file)
    problems.stop_if_any()
    notices = (*inputs.notices, *tensor_notices, *vocabulary.notices, *_license_notices(duties))
    return Plan(
        request, name, inputs, config, vocabulary, adapter, n_tensors, planned, style, importance,
        deviations, notices, duties,
    )  # fmt: skip


@dataclass(frozen=True)
class _Shape:
    """Turns a mix into the layout of a file of this model."""

    config: llama.LlamaConfig
    importance: Importance | None

    def plan_file(self, name: str, mix: Mix, entries: Sequence[Entry]) -> PlannedFile:
        """Return the planned file of a mix.

        Raises:
            ImportanceError: if a tensor needs an importance matrix that is not there.
        """
        config = self.config
        model = ModelShape(config.n_layer, config.n_head, config.n_head_kv, config.tied)
        tensors = []
        for tensor in llama.tensors(config):
            kind = choose_type(
                mix, tensor=tensor.name, shape=tensor.shape, model=model,
                importance=self.importance is not None,
            )  # fmt: skip
            self._check_importance(mix, tensor, kind)
            tensors.append((tensor.name, tensor.shape, kind))
        layout = lay_out(entries, tensors, file_type=mix.file_type)
        return PlannedFile(mix, f"{name}-{mix.name}.gguf", layout)

    def _check_importance(self, mix: Mix, tensor: llama.Tensor, kind: str) -> None:
        weights = self.importance.weights.get(tensor.name) if self.importance else None
        if weights is None and requires_importance(mix, tensor=tensor.name, kind=kind):
            raise ImportanceError(
                f"{mix.name} needs an importance matrix with weights for {tensor.name}; make one "
                "with llama.cpp's llama-imatrix and name it with --imatrix"
            )
        if weights is not None and weights.size != tensor.shape[-1]:
            raise ImportanceError(
                f"the importance matrix has {weights.size} weights for {tensor.name}, which has "
                f"{tensor.shape[-1]} columns; it belongs to another model"
            )


def _mixes(request: Request) -> list[Mix]:
    names = [name.strip() for name in request.variants or request.recipe.variants]
    mixes = [load_mix(name) for name in names]
    labels = [mix.name for mix in mixes]
    if double := next((label for label in labels if labels.count(label) > 1), None):
        raise UsageError(f"--quant names {double} twice")
    return mixes


def _unknown_limits(recipe: Recipe, mixes: Sequence[Mix]) -> list[str]:
    """Return what is wrong with the recipe's limits: a variant that nobody knows has none."""
    if recipe.parity is None:
        return []
    own = [*mixes, *(load_mix(name.strip()) for name in recipe.variants)]
    return unknown_variants(recipe.parity, [mix.name.lower() for mix in own])


def _check_target(request: Request) -> None:
    if request.out.exists() and not request.replace:
        raise WriteError(f"{shown(request.out)} exists; --force replaces it, or name another --out")
    if request.out.exists() and not (request.out / "pack.json").exists():
        raise WriteError(
            f"{shown(request.out)} is not a pack, --force does not replace it; name another --out"
        )


def _check_disk(out: Path, planned: Sequence[PlannedFile]) -> None:
    need, free = sum(file.layout.size for file in planned), files.disk_free(out)
    if need * _SPARE > free:
        raise WriteError(
            f"the pack needs {need / 1e9:.2f} GB and some room, {shown(out)} has "
            f"{free / 1e9:.2f} GB free; free some space, choose fewer variants or another --out"
        )


def _read_config(inputs: Inputs) -> llama.LlamaConfig:
    path = inputs.model_paths.get("config.json")
    if path is None:
        raise CheckpointError("there is no config.json; is this the folder of a model?")
    return llama.parse_config(strict_json(files.read_small(path), what="config.json"))


def _check_weights(
    inputs: Inputs, config: llama.LlamaConfig
) -> tuple[AdapterConfig | None, int, tuple[str, ...]]:
    """Compare the headers of the weights with what the configuration promises."""
    source = inputs.open()
    try:
        problems = list(_tensor_problems(source, config))
        if problems:
            raise PlanError("weights", problems)
        ignored = [n for n in source.tensors if llama.is_ignored(n, tied=config.tied)]
        notices = [f"{n} is left out: the embeddings are tied" for n in ignored if n == llama.HEAD]
        if not isinstance(source, Merged):
            return None, 0, tuple(notices)
        adapter = source.adapter
        if adapter.config.fan_in_fan_out:
            notices.append("fan_in_fan_out is set and ignored, as PEFT does for linear layers")
        return adapter.config, adapter.n_tensors, tuple(notices)
    finally:
        source.close()


def _tensor_problems(source: Checkpoint | Merged, config: llama.LlamaConfig) -> Iterator[str]:
    expected = {tensor.source: tensor for tensor in llama.tensors(config)}
    for name, tensor in expected.items():
        spec = source.tensors.get(name)
        if spec is None:
            yield f"tensor {name} is missing"
        elif spec.shape != tensor.shape:
            yield f"tensor {name} has the shape {spec.shape}, config.json promises {tensor.shape}"
    for name in source.tensors:
        if name not in expected and not llama.is_ignored(name, tied=config.tied):
            yield f"tensor {shown(name)} is not part of a LLaMA; nothing is left out in silence"


def _deviations(
    recipe: Recipe, config: llama.LlamaConfig, adapter: AdapterConfig | None
) -> Iterator[str]:
    """Yield how base and adapter differ from the published model's."""
    if recipe.expects.base is not None:
        yield from _differences("base", recipe.expects.base, {
            "architecture": config.architecture, "layers": config.n_layer,
            "hidden_size": config.n_embd, "intermediate_size": config.n_ff,
            "heads": config.n_head, "kv_heads": config.n_head_kv, "vocab_size": config.vocab,
        })  # fmt: skip
    if recipe.expects.adapter is not None and adapter is not None:
        yield from _differences("adapter", recipe.expects.adapter, {
            "r": adapter.r, "alpha": adapter.alpha, "dropout": adapter.dropout,
            "targets": sorted(adapter.targets),
        })  # fmt: skip
        for key, given in (("rank_pattern", adapter.rank_pattern),
                           ("alpha_pattern", adapter.alpha_pattern)):  # fmt: skip
            if given:
                yield f"the adapter has a {key}, the published one has none"
        if adapter.rslora:
            yield "the adapter scales by alpha / sqrt(r), the published one by alpha / r"


def _differences(
    what: str, expected: ExpectedBase | ExpectedAdapter, given: dict[str, object]
) -> Iterator[str]:
    for key, value in expected.model_dump().items():
        value = sorted(value) if isinstance(value, list) else value
        if given[key] != value:
            yield f"the {what} has {key} {given[key]}, the recipe expects {value}"


def _general(name: str, recipe: Recipe, config: llama.LlamaConfig) -> Iterator[Entry]:
    """Yield the ``general.*`` pairs: what a model page and a user see first."""
    g, text = Keys.General, GGUFValueType.STRING
    card, license_ = recipe.card, recipe.license
    parameters = sum(_product(tensor.shape) for tensor in llama.tensors(config))
    yield Entry(g.ARCHITECTURE, text, llama.ARCHITECTURE)
    yield Entry(g.TYPE, text, "model")
    yield Entry(g.NAME, text, name)
    yield from (Entry(g.ORGANIZATION, text, card.organization),) if card.organization else ()
    description = " ".join(part for part in (card.summary, card.limits) if part)
    yield Entry(g.DESCRIPTION, text, description)
    yield Entry(g.SIZE_LABEL, text, gguf_size_label(parameters, parameters, 0, 0))
    yield Entry(g.LICENSE, text, license_.id)
    yield Entry(g.LICENSE_NAME, text, license_.name)
    yield from (Entry(g.LICENSE_LINK, text, license_.link),) if license_.link else ()
    if card.base_model:
        organization, _, model = card.base_model.rpartition("/")
        yield Entry(g.BASE_MODEL_COUNT, GGUFValueType.UINT32, 1)
        yield Entry(g.BASE_MODEL_NAME.format(id=0), text, model)
        yield Entry(g.BASE_MODEL_ORGANIZATION.format(id=0), text, organization)
    yield from (Entry(g.TAGS, text, tuple(card.tags)),) if card.tags else ()
    yield from (Entry(g.LANGUAGES, text, tuple(card.languages)),) if card.languages else ()


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _duties(recipe: Recipe, inputs: Inputs) -> Iterator[Duty]:
    for file, names in recipe.license.texts.items():
        copies = (inputs.model, inputs.license)
        found = (find_text(copy, names) for copy in copies if copy is not None)
        path = next((path for path in found if path is not None), None)
        text = files.read_small(path, limit=1 << 20).decode("utf-8") if path else None
        yield Duty(file, text)


def _license_notices(duties: Sequence[Duty]) -> Iterator[str]:
    for duty in duties:
        if _lost_in_modelfile(duty):
            yield (
                f"{duty.file} holds characters that Ollama would drop, so the Modelfile only names "
                "the licence; the file itself is in the pack, unchanged"
            )
        if duty.text is None:
            yield (
                f"{duty.file} is missing: the licence asks for it, and neither the model nor the "
                "base repository here holds it. Put it beside the base weights and build again; "
                "the pack cannot be published without it"
            )


def _modelfile(style: Style, recipe: Recipe, duties: Sequence[Duty], file: PlannedFile) -> str:
    texts = tuple(duty.text for duty in duties if duty.text and not _lost_in_modelfile(duty))
    sentence = f"{recipe.license.name} {recipe.license.link or ''}".strip()
    modelfile = style.modelfile(
        f"./{file.file}", parameters=recipe.parameters, license=texts or (sentence,)
    )
    return render(modelfile, name=recipe.ollama, file=file.modelfile)


def _lost_in_modelfile(duty: Duty) -> bool:
    """Say whether Ollama's parser would change a licence text; the pack ships it as a file too."""
    text = duty.text or ""
    return '"""' in text or not all(map(survives, text))
