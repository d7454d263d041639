"""What the folders of model and adapter say beside the weights, held against what will be packed.

Shapes alone decide whether an adapter can be merged: one that was trained on another base of the
same size, with tokens of its own, or to be asked in another form, fits without an error. Returns
sentences for the user; refuses nothing, reads no weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from medllm_pack import resources
from medllm_pack.errors import shown
from medllm_pack.gguf.added import CONFIG, added_tokens, read_json
from medllm_pack.gguf.vocab import Vocabulary
from medllm_pack.pack.inputs import Inputs, paths
from medllm_pack.recipe import FOLDER, Recipe
from medllm_pack.weights.adapter_config import AdapterConfig
from medllm_pack.weights.needed import listed
from medllm_pack.weights.sources import LocalCopy

# Where transformers 5 writes what version 4 put into the configuration.
CHAT = "chat_template.jinja"
# Names of the same 16-bit weights: conversions, and what trainers quantize on the way.
_SAME = re.compile(r"([-_.](hf|bnb|unsloth|4bit|8bit))+\Z")


def claims(
    inputs: Inputs, adapter: AdapterConfig | None, vocabulary: Vocabulary, style: str
) -> tuple[str, ...]:
    """Return what the folders say that the pack will not do.

    Raises:
        VocabularyError: if a file of the adapter's tokenizer is damaged.
    """
    return (*_base(inputs, adapter), *_tokens(inputs, vocabulary), *_form(inputs, style))


def borrowed_name(recipe: Recipe, folder: Path, *, own: bool) -> tuple[str, ...]:
    """Return that a model of the user's own would bear the name of the published one.

    Args:
        recipe: the recipe.
        folder: where it lies.
        own: whether the weights are others than the recipe's.
    """
    if not own or recipe.merged is None or folder != resources.folder(FOLDER):
        return ()
    return (
        f"name, authors and model card are those of {recipe.name}; for a model of your own, "
        "copy the recipe (medllm-pack recipes copy), edit it, and build from its path",
    )


def _base(inputs: Inputs, adapter: AdapterConfig | None) -> Iterator[str]:
    """Yield that the adapter names another base than the one it is merged into."""
    said, model = adapter.base if adapter else None, inputs.model
    if said is None or model.kind == "builtin" or _plain(said) == _plain(model.source):
        return
    # This is recorded, and a pack must not depend on where its inputs lay.
    into = "the base of the folder given" if model.kind == "folder" else shown(model.source)
    yield (
        f"the adapter says it was trained on {shown(_public(said))} and is merged into "
        f"{into}; the shapes fit, the weights may be others. If they are, name the "
        "right base with --base"
    )


def _tokens(inputs: Inputs, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield the tokens that were added for the training and that the base does not have."""
    if inputs.adapter is None:
        return
    known = set(vocabulary.tokens)
    added = added_tokens(paths(inputs.adapter))
    if lost := [
        text for text in added if text not in known and text.replace("▁", " ") not in known
    ]:
        yield (
            f"the tokenizer beside the adapter adds {listed(lost)}, which the base lacks; they are "
            "left out. Were they used in training, and not for padding only? Then merge with PEFT "
            "into a base with room for them, and build with --merged"
        )


def _form(inputs: Inputs, style: str) -> Iterator[str]:
    """Yield that the model may have been trained to be asked in another form than the style's."""
    copies = [copy for copy in (inputs.adapter, inputs.model) if copy and _has_form(copy)]
    if copies:
        which = "adapter" if copies[0] is inputs.adapter else "weights"
        yield (
            f"a chat template lies beside the {which}, and the Modelfiles ask in the style "
            f"{shown(style)}. If the model was trained on chats, write their form as a style and "
            "name its folder with --template (docs/modelfiles.md)"
        )


def _has_form(copy: LocalCopy) -> bool:
    return CHAT in copy.files or bool(read_json(paths(copy), CONFIG).get("chat_template"))


def _plain(name: str) -> str:
    """Return a name as mirrors and folders of the same weights share it."""
    return re.sub(r"[^a-z0-9]", "", _SAME.sub("", _last(name).lower()))


def _public(name: str) -> str:
    """Return a repository's name, or the last component of a path on somebody's machine."""
    return name if re.fullmatch(r"[\w.\-]+/[\w.\-]+", name) and name[0] != "." else _last(name)


def _last(name: str) -> str:
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]
