"""Gist attention: one op with a dense oracle, a blocked XLA path, and the decoding op over the compressed cache."""

from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.gist_attention import GistKV, gist_attention

__all__ = ["GistKV", "decode_attention", "gist_attention"]
