"""Gist attention in Triton, for NVIDIA GPUs of compute capability 8.0 and later."""

from pallas_kernels.triton.decode import decode, decode_refusal
from pallas_kernels.triton.op import attend, refusal

__all__ = ["attend", "decode", "decode_refusal", "refusal"]
