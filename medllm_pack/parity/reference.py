"""The independent reference: transformers and PEFT, adapter unmerged, float32, layer by layer.

One decoder layer's weights are in memory at a time: all sequences go through it, then the next
comes. So a 7B needs a few GB and its weights are read once. Layers, norms and rotary frequencies
are transformers' classes and the low-rank path is PEFT's layer: the arithmetic is theirs.

Knows nothing of GGUF, nor of :mod:`~medllm_pack.parity.whole`, which computes the same in one
piece. Memory: a layer in float32, the head in float32, the hidden states of all sequences, the
logits of one. On another device than the CPU the hidden states stay behind, and the states of one
sequence are there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from medllm_pack.errors import MedllmError, shown
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.original import Original, Weights
from medllm_pack.progress import Reporter
from medllm_pack.quant.device import DeviceName

# model_type -> module of transformers and the prefix of its classes.
_CLASSES = {
    "llama": ("transformers.models.llama.modeling_llama", "Llama"),
    "mistral": ("transformers.models.mistral.modeling_mistral", "Mistral"),
}
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens", "model.norm", "lm_head"


def compute_logits(
    original: Original,
    sequences: Sequence[Sequence[int]],
    *,
    place: Nameless,
    device: DeviceName = "cpu",
    name: str = "reference",
    report: Reporter,
) -> list[Path]:
    """Compute the logits after every id of every sequence.

    Args:
        original: the model and its adapter.
        sequences: ids, each sequence on its own from position 0.
        place: where a file in .npy form is written for each, float32, shape (ids, vocabulary).
        device: where layers are computed.
        name: what the step is called.
        report: listener; a step counts layers as bytes of weights.

    Raises:
        MedllmError: if transformers' classes for the model are not known here.
    """
    import torch

    with torch.no_grad():
        stack = _Stack(original, original.weights(), device)
        report.step(name, total_bytes=stack.config.num_hidden_layers)
        hidden = stack.embed(sequences)
        for index in range(stack.config.num_hidden_layers):
            hidden = stack.pass_layer(index, hidden)
            report.advance(1)
        return stack.write_logits(hidden, place)


class _Stack:
    """Builds one part of the model after the other."""

    def __init__(self, original: Original, weights: Weights, device: DeviceName) -> None:
        self.config = config = original.transformers_config()
        config._attn_implementation = "sdpa"  # how transformers' loader notes its choice
        if config.model_type not in _CLASSES:
            raise MedllmError(f"there is no reference for models of type {config.model_type!r}")
        module, prefix = _CLASSES[config.model_type]
        classes = import_module(module)
        self.layer_class = getattr(classes, f"{prefix}DecoderLayer")
        self.norm_class = getattr(classes, f"{prefix}RMSNorm")
        self.rotary = getattr(classes, f"{prefix}RotaryEmbedding")(config).to(device)
        self.weights, self.device = weights, device
        self.adapter = original.adapter_weights()
        self.lora = original.peft_config() if self.adapter else None

    def embed(self, sequences: Sequence[Sequence[int]]) -> list[Any]:
        """Return the embeddings of each sequence, shape (1, ids, width)."""
        import torch

        table = self.weights.get(f"{_EMBEDDING}.weight")
        return [table[torch.tensor([list(ids)])].float() for ids in sequences]

    def pass_layer(self, index: int, hidden: Sequence[Any]) -> list[Any]:
        """Return the states of all sequences after a layer, whose weights are freed then."""
        import torch

        with torch.device("meta"):
            layer = self.layer_class(self.config, index)
        layer = self._filled(f"model.layers.{index}", layer)
        return [self._apply(layer, states) for states in hidden]

    def write_logits(self, hidden: Sequence[Any], place: Nameless) -> list[Path]:
        """Write the logits of each sequence; return the files."""
        import torch

        with torch.device("meta"):
            norm = self.norm_class(self.config.hidden_size, eps=self.config.rms_norm_eps)
            head = torch.nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        norm = self._filled(_NORM, norm)
        tied = f"{_HEAD}.weight" not in self.weights or self.config.tie_word_embeddings
        head = self._filled(_HEAD, head, weights=_EMBEDDING if tied else _HEAD)
        return [
            place.save(head(norm(states.to(self.device)))[0].cpu().numpy()) for states in hidden
        ]

    def _apply(self, layer: Any, states: Any) -> Any:
        import torch

        length, states = states.shape[1], states.to(self.device)
        positions = torch.arange(length, device=self.device)[None]
        result = layer(
            states, attention_mask=self._mask(length), position_ids=positions,
            position_embeddings=self.rotary(states, positions), use_cache=False,
        )  # fmt: skip
        return (result[0] if isinstance(result, tuple) else result).cpu()

    def _mask(self, length: int) -> Any:
        """Return what is added to the scores: nothing for the past, -inf for the rest."""
        import torch

        steps = torch.arange(length, device=self.device)
        ago = steps[:, None] - steps[None, :]
        seen = ago >= 0
        if window := getattr(self.config, "sliding_window", None):
            seen &= ago < window
        nothing = torch.zeros(length, length, device=self.device)
        return nothing.masked_fill(~seen, float("-inf"))[None, None]

    def _filled(self, name: str, module: Any, *, weights: str | None = None) -> Any:
        """Give a module its weights, and PEFT's layers where the adapter has pairs for it."""
        source = weights or name
        state = {
            key: self.weights.get(f"{source}.{key}").to(self.device).float()
            for key in module.state_dict()
        }
        module.load_state_dict(state, strict=True, assign=True)
        adapter = {k: v for k, v in self.adapter.items() if k.startswith(f"{name}.")}
        return _with_adapter(name, module, self.lora, adapter) if adapter else module.eval()


def _with_adapter(name: str, module: Any, lora: Any, tensors: Mapping[str, Any]) -> Any:
    """Put PEFT's layers into a module that stands alone, under its full name in the model."""
    from peft import inject_adapter_in_model

    root = _nest(name, module)
    inject_adapter_in_model(lora, root)
    state = {re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", k): v.float()
             for k, v in tensors.items()}  # fmt: skip
    # PEFT may have stored what lies below its layer, too: it is loaded as PEFT would.
    places = root.state_dict().keys()
    expected = {key for key in places if ".lora_" in key or key in state}
    if expected != set(state):
        odd = min(expected.symmetric_difference(state))
        raise MedllmError(f"PEFT and the adapter's file do not agree on {shown(odd)}")
    root.load_state_dict(state, strict=False)
    return root.get_submodule(name).eval()


def _nest(name: str, module: Any) -> Any:
    """Return a module that holds ``module`` under a dotted name, as the whole model would."""
    import torch

    for part in reversed(name.split(".")):
        holder = torch.nn.Module()
        holder.add_module(part, module)
        module = holder
    return module
