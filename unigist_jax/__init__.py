"""UniGist in JAX: long-context language models whose KV cache is replaced by learned gist tokens."""

__version__ = "0.1.0"
