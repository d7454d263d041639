"""The reference in one piece: transformers' model and PEFT's around it, whole, on one device.

Weights go to the device one after the other and become float32 there: this process holds one of
them at a time, the device all. Who runs out of its memory gets torch's own error.

Knows nothing of GGUF, nor of :mod:`~medllm_pack.parity.reference`, which goes layer by layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medllm_pack.errors import MedllmError, shown
from medllm_pack.parity.nameless import Nameless
from medllm_pack.parity.original import Original, Weights
from medllm_pack.progress import Reporter
from medllm_pack.quant.device import DeviceName

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


def compute_logits(
    original: Original,
    sequences: Sequence[Sequence[int]],
    *,
    place: Nameless,
    device: DeviceName,
    name: str = "reference",
    report: Reporter,
) -> list[Path]:
    """Compute the logits after every id of every sequence.

    Args:
        original: the model and its adapter.
        sequences: ids, each sequence on its own from position 0.
        place: where a file in .npy form is written for each, float32, shape (ids, vocabulary).
        device: where the model goes.
        name: what the step is called.
        report: listener; a step counts tensors, then texts, as bytes.

    Raises:
        MedllmError: if the adapter is not all that PEFT has a place for, or more.
    """
    import torch

    paths = []
    with torch.no_grad():
        model = _load(original, device, report)
        report.step(name, total_bytes=len(sequences))
        for ids in sequences:
            given = torch.tensor([list(ids)], device=device)
            paths.append(place.save(model(given, use_cache=False).logits[0].cpu().numpy()))
            report.advance(1)
    return paths


def _load(original: Original, device: DeviceName, report: Reporter) -> Any:
    """Return the model with its adapter, unmerged, in float32."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    # Parameters without memory; buffers, such as the rotary frequencies, which no file holds, are
    # computed by the model itself.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            original.transformers_config(), dtype=torch.float32, attn_implementation="sdpa"
        )
    _fill(model, original.weights(), device, report)
    model.to(device)  # the buffers; a weight that was not in the files cannot go there
    if original.adapter is not None:
        model = _with_adapter(model, original, device)
    return model.eval()


def _fill(model: Any, weights: Weights, device: DeviceName, report: Reporter) -> None:
    """Give every module its weights from the files, and the head the embeddings if they are one."""
    tied = model.config.tie_word_embeddings
    modules = {name: module for name, module in model.named_modules() if _holds_weights(module)}
    report.step("weights of the reference", total_bytes=len(modules))
    for name, module in modules.items():
        if not (tied and name == _HEAD):
            source = name if name != _HEAD or f"{_HEAD}.weight" in weights else _EMBEDDING
            state = {
                key: weights.get(f"{source}.{key}").to(device).float()
                for key in module.state_dict()
            }
            module.load_state_dict(state, strict=True, assign=True)
        report.advance(1)
    if tied:
        model.tie_weights()


def _holds_weights(module: Any) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _with_adapter(model: Any, original: Original, device: DeviceName) -> Any:
    """Put PEFT's model around the model."""
    from peft import PeftModel, set_peft_model_state_dict

    with warnings.catch_warnings():
        # PEFT asks for a name that transformers is going to change.
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel(model, original.peft_config())
    result = set_peft_model_state_dict(model, original.adapter_file(device))
    odd = [*result.unexpected_keys, *(key for key in result.missing_keys if ".lora_" in key)]
    if odd:
        raise MedllmError(f"PEFT and the adapter's file do not agree on {shown(min(odd))}")
    return model
