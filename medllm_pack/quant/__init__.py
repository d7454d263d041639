"""Quantization: the choice of types and the bytes of each block."""
