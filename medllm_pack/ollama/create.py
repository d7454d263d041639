"""What ``ollama create`` makes of a variant of a pack: manifest, configuration and layers.

Byte for byte what Ollama writes into its store, so that the digest of a model is the same whether
it was created, installed, pushed or unpacked. Follows server/create.go, create/manifest.go,
types/model/config.go and format/format.go as of autumn 2026: no ``rootfs``, ``architecture`` or
``os`` in the configuration, and ``from`` names the file. Older versions wrote these three and read
ours as well. Nothing large is read: the weights are known by pack.json.

A GGUF file of a pack carries no chat template, from which Ollama would guess stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from medllm_pack.digests import Digest
from medllm_pack.errors import ModelfileError
from medllm_pack.gguf.reader import GGUFFile, read_gguf
from medllm_pack.ollama import gojson
from medllm_pack.ollama.image import DOCKER_MANIFEST, Blob, Image
from medllm_pack.ollama.reading import read_modelfile
from medllm_pack.ollama.rules import ParameterValue

CONFIG: Final = "application/vnd.docker.container.image.v1+json"
MODEL: Final = "application/vnd.ollama.image.model"
TEMPLATE: Final = "application/vnd.ollama.image.template"
SYSTEM: Final = "application/vnd.ollama.image.system"
LICENSE: Final = "application/vnd.ollama.image.license"
PARAMS: Final = "application/vnd.ollama.image.params"
MESSAGES: Final = "application/vnd.ollama.image.messages"

# ollama fs/gguf/file_type.go, FileType.String, for the numbers of general.file_type.
_FILE_TYPES: Final[Mapping[int, str]] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K",
    11: "Q3_K_S", 12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S",
    17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS",
    23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S", 29: "IQ2_M",
    30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0",
}  # fmt: skip


@dataclass(frozen=True)
class Creation:
    """What a Modelfile asks ``ollama create`` for, as Ollama's parser reads it.

    Attributes:
        file: the weights, beside the Modelfile.
        template: prompt template.
        system: system text; empty for none.
        parameters: as they are stored: numbers, truth values, ``stop`` a list; in Go's order.
        license: licence texts.
    """

    file: str
    template: str
    system: str
    parameters: Mapping[str, gojson.Value]
    license: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, *, name: str) -> Creation:
        """Read a Modelfile that this package wrote; ``name`` names it in messages.

        Raises:
            ModelfileError: if it has something that this package does not write.
        """
        try:
            read = read_modelfile(text)
        except ModelfileError as error:
            raise ModelfileError(f"{name}: {error}") from error
        parameters = {key: _stored(value) for key, value in (read.parameters or {}).items()}
        return cls(
            file=read.from_.removeprefix("./"),
            template=read.template,
            system=read.system,
            parameters=gojson.sorted_map(parameters),
            license=tuple(read.license),
        )


def image_of(creation: Creation, *, weights: Path, size: int, digest: Digest) -> Image:
    """Return the image that ``ollama create`` would write.

    Args:
        creation: from the Modelfile.
        weights: the GGUF file; its header is read.
        size: bytes of the file.
        digest: of the file.

    Raises:
        GGUFError: if the header is damaged.
    """
    model = Blob(MODEL, digest, size, weights)
    layers = (model, *text_layers(creation))
    config = Blob.of(gojson.encode(_config(read_gguf(weights))), CONFIG)
    entries = [
        layer.descriptor() | ({"from": creation.file} if layer is model else {}) for layer in layers
    ]
    manifest: dict[str, gojson.Value] = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": config.descriptor(),
        "layers": entries,
    }
    return Image(DOCKER_MANIFEST, gojson.encode(manifest), config, layers)


def human_number(n: int) -> str:
    """Return a number of weights as Ollama shows it: 6738415616 -> ``6.7B``."""
    for unit, scale, places in (("B", 10**9, 1), ("M", 10**6, 2)):
        if n >= scale:
            return f"{n / scale:.{0 if n % scale == 0 else places}f}{unit}"
    return f"{n / 1000:.0f}K" if n >= 1000 else str(n)


def _config(header: GGUFFile) -> dict[str, gojson.Value]:
    family = str(header.metadata.get("general.architecture", "unknown"))
    return {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": human_number(header.parameters),
        "file_type": _FILE_TYPES.get(header.metadata.get("general.file_type", -1), "unknown"),
    }


def text_layers(creation: Creation) -> Iterator[Blob]:
    """Yield the layers beside the weights, in Ollama's order."""
    yield Blob.of(creation.template.encode(), TEMPLATE)
    if creation.system:
        yield Blob.of(creation.system.encode(), SYSTEM)
    for text in creation.license:
        yield Blob.of(text.encode(), LICENSE)
    if creation.parameters:
        yield Blob.of(gojson.encode(creation.parameters), PARAMS)


def _stored(value: ParameterValue) -> gojson.Value:
    """Return a parameter as Ollama stores it."""
    # A text is a sequence for the type, and never the value of a parameter of ours.
    return gojson.float32(repr(value)) if isinstance(value, float) else value
