"""Gist attention on TPU, in Pallas Mosaic."""

from pallas_kernels.tpu.decode import decode, decode_refusal
from pallas_kernels.tpu.op import attend, refusal

__all__ = ["attend", "decode", "decode_refusal", "refusal"]
