"""Gist attention on Hopper GPUs (compute capability 9.0), in Pallas Mosaic GPU."""

from pallas_kernels.hopper.decode import decode, decode_refusal
from pallas_kernels.hopper.op import attend, refusal

__all__ = ["attend", "decode", "decode_refusal", "refusal"]
