"""What still counts as the same model, by type of variant. Data only.

Calibrated by measurement on the tiny model and on pico models of LLaMA-2 and Mistral shape with
random weights: what a sound variant showed, times three or more (F16: mean KLD 1.3e-6, Q8_0 7e-4,
Q6_K 3e-3, Q5_0 8e-3, Q4_0 3e-2, Q3_K_M 6e-2, Q2_K 0.22). A 7B suffers less from quantization than
models as small as these, so the limits are generous for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class LogitLimits:
    """Limits of a variant against the reference.

    Attributes:
        kld_mean, kld_p99: nats a token.
        top1: least share of the same likeliest token, where the reference's choice is clear.
        ppl: largest departure of the ratio of perplexities from 1.
    """

    kld_mean: float
    kld_p99: float
    top1: float
    ppl: float


@dataclass(frozen=True, slots=True)
class WeightLimits:
    """Limits of one tensor of a quantized type.

    Attributes:
        rmse: root mean square error, relative to the root mean square of the tensor.
        worst: largest error of a weight, relative to the largest of its block (or the tensor's
            root mean square, where the block is smaller).
    """

    rmse: float
    worst: float


# Prefix of the variant's name -> limits; the first prefix that fits counts.
LOGITS: Mapping[str, LogitLimits] = MappingProxyType(
    {
        "f32": LogitLimits(1e-4, 1e-3, 0.995, 0.002),
        "f16": LogitLimits(1e-4, 1e-3, 0.995, 0.002),
        "bf16": LogitLimits(1e-3, 1e-2, 0.99, 0.01),
        "q8_0": LogitLimits(5e-3, 5e-2, 0.99, 0.02),
        "q6_k": LogitLimits(2e-2, 0.2, 0.98, 0.03),
        "q5": LogitLimits(3e-2, 0.3, 0.97, 0.05),
        "q4": LogitLimits(0.1, 1.0, 0.95, 0.1),
        "iq4": LogitLimits(0.1, 1.0, 0.95, 0.1),
        "q3": LogitLimits(0.25, 2.0, 0.9, 0.2),
        "iq3": LogitLimits(0.4, 3.0, 0.85, 0.4),
        "q2": LogitLimits(1.0, 6.0, 0.6, 1.0),
        "": LogitLimits(3.0, 15.0, 0.2, 10.0),  # below that, only nonsense is refused
    }
)

# ggml type -> limits. A step of Q8_0 is 1/127 of the largest weight, and rounding misses by half.
WEIGHTS: Mapping[str, WeightLimits] = MappingProxyType(
    {
        "Q8_0": WeightLimits(0.01, 0.005),
        "Q6_K": WeightLimits(0.03, 0.06),
        "Q5_K": WeightLimits(0.05, 0.1),
        "Q5_0": WeightLimits(0.07, 0.1),
        "Q5_1": WeightLimits(0.06, 0.1),
        "Q4_K": WeightLimits(0.11, 0.25),
        "Q4_0": WeightLimits(0.13, 0.25),
        "Q4_1": WeightLimits(0.12, 0.25),
        "IQ4_NL": WeightLimits(0.12, 0.3),
        "IQ4_XS": WeightLimits(0.12, 0.3),
        "Q3_K": WeightLimits(0.25, 0.6),
        "Q2_K": WeightLimits(0.5, 0.8),
    }
)
COARSE = WeightLimits(0.8, 1.5)  # three bits with tables, two bits and less

# How far the adapter's share of a tensor may be from 1, before noise of the quantizer.
MERGE_EXACT, MERGE_QUANTIZED = 0.02, 0.25

# Greedy tokens of each prompt that an unquantized variant must write as the reference would.
GREEDY_AGREEMENT = 0.98
# The reference's logit of a token may be this much below its best: a tie within the type's noise.
GREEDY_TIES: Mapping[str, float] = MappingProxyType({"f32": 0.02, "f16": 0.02, "bf16": 0.2})


# Tokens that a server must write as llama.cpp does, and the lead of a token below which another
# choice is as good: servers compute with other kernels. Not calibrated on a real server yet.
SERVED_AGREEMENT, SERVED_TIE = 0.9, 0.5


def logit_limits(quant: str) -> LogitLimits:
    """Return the limits for a variant, such as ``q4_k_m``."""
    return next(limits for prefix, limits in LOGITS.items() if quant.startswith(prefix))


def weight_limits(kind: str) -> WeightLimits:
    """Return the limits for a ggml type, such as ``Q4_K``."""
    return WEIGHTS.get(kind, COARSE)
