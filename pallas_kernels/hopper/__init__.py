"""Gist attention on Hopper GPUs (compute capability 9.0), in Pallas Mosaic GPU."""

from pallas_kernels.hopper.op import check_supported, gist_attention_hopper

__all__ = ["check_supported", "gist_attention_hopper"]
