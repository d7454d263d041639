"""The ``general.*`` pairs of a file: what a model page and a user see of it first.

From the recipe's card and licence. What llama.cpp needs to run the model is
:func:`medllm_pack.gguf.llama.metadata`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from gguf import GGUFValueType, Keys
from gguf import size_label as gguf_size_label

from medllm_pack.gguf import llama
from medllm_pack.gguf.layout import Entry
from medllm_pack.recipe import Recipe


def general(name: str, recipe: Recipe, config: llama.LlamaConfig) -> Iterator[Entry]:
    """Yield the pairs of a model of that name."""
    g, text = Keys.General, GGUFValueType.STRING
    card, license_ = recipe.card, recipe.license
    parameters = sum(math.prod(tensor.shape) for tensor in llama.tensors(config))
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
