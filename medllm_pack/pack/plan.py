"""The plan of a build: everything that can be known or refused before a weight is read.

:func:`make_plan` turns a :class:`Request` into a :class:`Plan`: it asks one question after the
other, of the recipe, config.json, the tokenizer and the headers of the weights alone, and raises
all that is missing or wrong at once. The answers are worked out next door. Nothing here reads
weights or writes files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medllm_pack.gguf import llama
from medllm_pack.gguf.vocab import Vocabulary, read_vocabulary
from medllm_pack.ollama.modelfile import render
from medllm_pack.ollama.style import Style
from medllm_pack.pack import destination, duties, variants
from medllm_pack.pack.claims import borrowed_name, claims
from medllm_pack.pack.duties import Duty
from medllm_pack.pack.expected import deviations
from medllm_pack.pack.headers import Headers, read_config, read_headers
from medllm_pack.pack.inputs import Inputs, choose, gather
from medllm_pack.pack.metadata import general
from medllm_pack.pack.problems import Problems
from medllm_pack.pack.variants import PlannedFile
from medllm_pack.progress import SILENT, Reporter
from medllm_pack.quant.importance import Importance, read_importance
from medllm_pack.recipe import Recipe
from medllm_pack.weights.adapter_config import AdapterConfig
from medllm_pack.weights.header import DType


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
class Plan:
    """Everything about a build but the weights.

    Attributes:
        name: name of the result; ends in ``-custom`` where it departs from the recipe.
        inputs: local copies of what is read.
        adapter: what the adapter's configuration says; None if merged weights are packed.
        adapter_tensors: tensors of the adapter; each is used exactly once.
        adapter_pairs: matrices that the adapter changes.
        stored: types in which the matrices of the model are stored.
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
    adapter_pairs: int
    stored: frozenset[DType]
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


def make_plan(request: Request, *, weights: bool = True, report: Reporter = SILENT) -> Plan:
    """Plan a build.

    Args:
        request: what was asked for.
        weights: whether weights on the Hub are fetched now; ``plan`` does without.
        report: listener; downloads are its steps.

    Raises:
        UsageError: if a variant, style or source does not exist, or options contradict.
        PlanError: with everything that is missing or wrong.
    """
    recipe, out = request.recipe, request.out
    mixes = variants.load_mixes(request.variants or recipe.variants)
    style = Style.load(request.template or recipe.template)
    sources = choose(recipe, base=request.base, adapter=request.adapter, merged=request.merged)
    problems = Problems(recipe.name)
    problems.attempt(destination.check_free_name, out, replace=request.replace)
    problems.found += variants.unknown_limits(recipe, mixes)
    importance = problems.attempt(read_importance, request.imatrix) if request.imatrix else None
    inputs = problems.need(
        gather, recipe, sources, folder=request.folder, report=report, weights=weights
    )
    config = problems.need(read_config, inputs)
    read = problems.attempt(read_headers, inputs, config) if inputs.has_weights else None
    headers = read or Headers()
    differences = tuple(deviations(recipe, config, headers.adapter))
    if recipe.strict:
        problems.found += [f"{fact}; the recipe is strict" for fact in differences]
    vocabulary = problems.need(read_vocabulary, inputs.model_paths, rows=config.vocab)
    said = problems.attempt(claims, inputs, headers.adapter, vocabulary, style.name) or ()
    texts = tuple(duties.find_duties(recipe, inputs))
    name = recipe.name + ("-custom" if differences else "")
    entries = (*general(name, recipe, config), *llama.metadata(config), *vocabulary.metadata())
    planned = problems.need(
        variants.plan_files, name, mixes, config, entries=entries, importance=importance
    )
    need = sum(file.layout.size for file in planned)
    problems.attempt(destination.check_free_space, out, need=need)
    for file in planned:
        problems.attempt(_modelfile, style, recipe, texts, file)
    problems.stop_if_any()
    own = request.adapter is not None or request.merged is not None
    notices = (
        *inputs.notices, *borrowed_name(recipe, request.folder, own=own), *headers.notices, *said,
        *vocabulary.notices, *duties.notices(texts),
    )  # fmt: skip
    return Plan(
        request, name, inputs, config, vocabulary, headers.adapter, headers.adapter_tensors,
        headers.adapter_pairs, headers.stored, planned, style, importance, differences, notices,
        texts,
    )  # fmt: skip


def _modelfile(style: Style, recipe: Recipe, texts: Sequence[Duty], file: PlannedFile) -> str:
    modelfile = style.modelfile(
        f"./{file.file}",
        parameters=recipe.parameters,
        license=duties.in_modelfile(recipe.license, texts),
    )
    return render(modelfile, name=recipe.ollama, file=file.modelfile)
