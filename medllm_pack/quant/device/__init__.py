"""Quantization on another device: the same bytes, by the same operations, many blocks at once.

:mod:`~medllm_pack.quant.device.door` is the way in. It imports torch, and is itself imported only
when a device is asked for.
"""

from typing import Literal

DeviceName = Literal["cpu", "cuda"]
