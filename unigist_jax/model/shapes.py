"""The published Llama models: sizes, rotary embedding and dtype as in their config.json; and a tiny one."""

from __future__ import annotations

from unigist_jax.model.config import LlamaConfig, RopeScaling


def _llama2(hidden, intermediate, layers, heads, kv_heads):
    return LlamaConfig(
        32_000, hidden, intermediate, layers, heads, kv_heads, hidden // heads,
        rope_theta=10_000.0, max_position_embeddings=4096, param_dtype="float16", dtype="float16",
    )  # fmt: skip


def _llama3(hidden, intermediate, layers, heads, stretch=None, context=131_072, tied=False):
    return LlamaConfig(
        128_256, hidden, intermediate, layers, heads, 8, hidden // heads,
        rope_theta=500_000.0, rope_scaling=stretch and RopeScaling(stretch), max_position_embeddings=context,
        tie_embeddings=tied, param_dtype="bfloat16", dtype="bfloat16",
    )  # fmt: skip


SHAPES: dict[str, LlamaConfig] = {
    "llama2-7b": _llama2(4096, 11_008, 32, 32, 32),
    "llama2-13b": _llama2(5120, 13_824, 40, 40, 40),
    "llama2-70b": _llama2(8192, 28_672, 80, 64, 8),
    "llama3-8b": _llama3(4096, 14_336, 32, 32, context=8192),
    "llama3-70b": _llama3(8192, 28_672, 80, 64, context=8192),
    "llama3.1-8b": _llama3(4096, 14_336, 32, 32, stretch=8.0),
    "llama3.1-70b": _llama3(8192, 28_672, 80, 64, stretch=8.0),
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, stretch=32.0, tied=True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, stretch=32.0, tied=True),
}
TINY = LlamaConfig(256, 64, 128, 2, 4, 2, 16, param_dtype="float32", dtype="float32")  # to try a benchmark on a CPU


def named_shape(name: str) -> LlamaConfig:
    """A model of `SHAPES`, or "tiny". Raises ValueError for another name."""
    if name != "tiny" and name not in SHAPES:
        raise ValueError(f"--shape={name} is unknown; choose among tiny, {', '.join(SHAPES)}")
    return TINY if name == "tiny" else SHAPES[name]
