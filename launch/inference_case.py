"""One configuration of launch.bench_inference, in a process of its own.

  python -m launch.inference_case '{"system": "unigist", "kind": "latency", "ratio": 4, …}' RESULT.json

What is measured, by `kind`
  latency  prompts of random tokens are read and continued by `generate`: time to the first token, and between tokens
  chunks   prompts are read in chunks of several sizes
  decode   a cache of random keys and values is decoded from, up to its length: tokens a second of a batch
  limit    likewise, but the last chunk of the context is read first: what a context of this length takes and leaves

Weights are random, of the exact shape, drawn on the device array by array. A first round compiles and is timed apart.
Whatever goes wrong is written to RESULT.json as well.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from unigist_jax.config import with_method
from unigist_jax.layout import GistLayout
from unigist_jax.model.config import LlamaConfig
from unigist_jax.model.shapes import named_shape

CHUNKWISE = "activation_beacon", "autocompressors"
RESERVE_BYTES = 3 * 2**29  # left free beside the largest batch: programs, logits, what steps need for a while


@dataclasses.dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
      system: a method of this project (`unigist_jax.inference.methods`), or "transformers" (torch, sdpa).
      kind: "latency", "chunks", "decode" or "limit" (see the module).
      ratio: raws per gist, or of a context over those kept of it; None where nothing is compressed.
      shape: a name of `named_shape`.
      context: tokens of each sequence before the generated ones.
      batch: sequences; 0, of "decode" alone: as many as fit.
      new_tokens: tokens generated for each.
      chunk_sizes: raws of a prefill chunk, tried in turn by "chunks"; others take the first; empty: the default.
      rounds: timed rounds; the median is kept.
      memory_gib: what the process may use of the device's memory; None: nearly all.
      tensor: devices that share the heads and columns of each layer; bytes are then those of one of them.
    """

    system: str
    kind: str
    ratio: int | None
    shape: str
    context: int
    batch: int = 1
    new_tokens: int = 128
    chunk_sizes: tuple[int, ...] = ()
    rounds: int = 3
    memory_gib: float | None = None
    tensor: int = 1

    @property
    def name(self) -> str:
        """What tells it from others."""
        system = f"{self.system}-r{self.ratio}" if self.ratio else self.system
        within = f"-{self.memory_gib:g}gib" if self.memory_gib else ""
        devices = f"-{self.tensor}devices" if self.tensor > 1 else ""
        return f"{system}-{self.kind}-{self.context}-b{self.batch or 'max'}{within}{devices}"

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        return named_shape(self.shape)

    @property
    def layout(self) -> GistLayout:
        """What is kept, with the chunks and summaries that a chunk-wise method implies."""
        layout = GistLayout(self.ratio or 4)
        if self.system not in CHUNKWISE:
            return layout
        return GistLayout(
            **with_method({"method": self.system, "model": {}, "gist": dataclasses.asdict(layout)})["gist"]
        )


def parse_system(name: str) -> tuple[str, int | None]:
    """`unigist8` as ("unigist", 8); `full` and `transformers` have no ratio."""
    from unigist_jax.inference.methods import METHODS

    if name in ("full", "transformers"):
        return name, None
    methods = sorted(METHODS.keys() - {"full"})
    match = re.fullmatch(rf"({'|'.join(methods)})([1-9]\d*)", name)
    if not match:
        raise ValueError(f"--systems: unknown {name!r}; choose full, transformers, or one of {methods} and a ratio")
    return match[1], int(match[2])


def measure(case: Case) -> dict[str, Any]:
    """A case of this project's own methods."""
    from launch.flags import tensor_mesh

    with tensor_mesh(case.tensor) as mesh:
        return _measure(case, mesh)


def _measure(case: Case, mesh) -> dict[str, Any]:
    import jax

    from unigist_jax.inference.methods import METHODS
    from unigist_jax.inference.prefill import default_chunk_size

    device, layout = jax.devices()[0], case.layout
    result = {"device": device.device_kind, "jax": jax.__version__}
    result["copy_bytes_s"] = copy_bandwidth(2**20 if case.shape == "tiny" else 2**30)
    start = time.perf_counter()
    model = jax.block_until_ready(random_model(case.config, layout, mesh))
    result["weights_s"] = time.perf_counter() - start
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model))
    table = model.embedding[...].addressable_shards[0].data.nbytes  # of which a step reads rows, unless it is the head
    looked_up = 0 if case.config.tie_embeddings else table
    result["weights_bytes"] = weights
    chunk = case.chunk_sizes[0] if case.chunk_sizes else default_chunk_size(layout, max(1, case.batch))
    kinds = {"latency": _latency, "chunks": _chunks, "decode": _decode, "limit": _decode}
    result |= kinds[case.kind](case, model, METHODS[case.system], chunk)
    result["cache_bytes"] //= case.tensor
    read = result["cache_bytes"]  # of the baselines, all that they hold
    if case.system in ("unigist", "full"):
        read = read_of_cache(case, layout, result.get("batch", case.batch)) // case.tensor
    result["step_bytes"] = weights - looked_up + read
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        peak = stats["peak_bytes_in_use"]
        result |= {"peak_bytes": peak, "limit_bytes": stats["bytes_limit"]}
        result["temporary_bytes"] = peak - weights - result["cache_bytes"]
        if case.memory_gib:
            result["used_bytes"] = used = device_memory()[0]
            if used > case.memory_gib * 2**30:
                raise MemoryError(f"{used / 2**30:.2f} GiB of the device are used, more than {case.memory_gib:g}")
    return result


def read_of_cache(case: Case, layout, batch: int) -> int:
    """Bytes of keys and values that a step of decoding at the case's context cannot do without."""
    config = case.config
    itemsize = 4 if config.dtype == "float32" else 2
    a_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize
    if case.system == "full":
        return batch * case.context * a_token
    return (layout.num_sinks + batch * (case.context // layout.ratio + layout.window)) * a_token


def device_memory() -> tuple[int, int]:
    """Bytes of the first visible GPU that are used, by whatever, and that there are, as the driver tells."""
    query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    query += [f"--id={os.environ.get('CUDA_VISIBLE_DEVICES', '0').split(',')[0]}"]
    first = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    used, total = (int(x) * 2**20 for x in first.split(","))
    return used, total


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    import jax
    import jax.numpy as jnp

    from launch.timing import milliseconds

    x = jnp.ones(num_bytes // 4, jnp.float32)
    return 2 * x.nbytes / milliseconds(jax.jit(jnp.copy), x, repeats=5) * 1e3


def random_model(config: LlamaConfig, layout, mesh=None):
    """A model for inference, its layers apart, drawn array by array: no second copy exists at any time."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from unigist_jax.inference import for_inference
    from unigist_jax.model import Llama
    from unigist_jax.sharding import abstract_on, layer_sharding

    def of_one_layer(stack):
        sharding = layer_sharding(stack.sharding) if mesh else None
        return jax.ShapeDtypeStruct(stack.shape[1:], stack.dtype, sharding=sharding)

    model = jax.eval_shape(lambda: Llama(config, layout, rngs=nnx.Rngs(params=0)))
    model = abstract_on(mesh, model) if mesh else model
    layer = jax.tree.map(of_one_layer, model.layers)
    model.layers = nnx.List([jax.tree.map(lambda x: x, layer) for _ in range(config.num_layers)])
    leaves, tree = jax.tree_util.tree_flatten_with_path(model)
    drawn = []
    for seed, (path, leaf) in enumerate(leaves):
        is_norm = "norm" in jax.tree_util.keystr(path)
        array = jnp.ones(leaf.shape, leaf.dtype) if is_norm else noise(seed, leaf, 0.02)
        drawn.append(jax.device_put(array, leaf.sharding) if mesh else array)
    return for_inference(jax.tree.unflatten(tree, drawn))


def noise(seed: int, like: Any, deviation: float):
    """Uniform noise of a standard deviation and of the shape and dtype of `like`, made without any temporary array."""
    return _draw()(np.uint32(seed), np.float32(deviation), like.shape, like.dtype)


@lru_cache
def _draw() -> Callable:
    """The jitted function of `noise`: one for all calls, so that each shape is compiled once."""
    import jax
    import jax.numpy as jnp

    @partial(jax.jit, static_argnames=("shape", "dtype"))
    def draw(seed, deviation, shape, dtype):
        x = jax.lax.iota(jnp.uint32, np.prod(shape)) + seed * jnp.uint32(0x9E3779B9)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # the finaliser of MurmurHash3
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        uniform = (x >> 8).astype(jnp.float32) / 2**23 - 1
        return (uniform * (deviation * 3**0.5)).astype(dtype).reshape(shape)

    return draw


# --- kinds ------------------------------------------------------------------------------------------------------------


def one_round(run: Callable[[Callable[[], None]], None]) -> dict[str, float]:
    """Times of one call `run(on_token)`, which calls back at every token."""
    times: list[float] = []
    start = time.perf_counter()
    run(lambda: times.append(time.perf_counter()))
    first, last = times[0] - start, times[-1] - start
    return {"ttft_s": first, "tpot_s": (last - first) / max(1, len(times) - 1), "total_s": last}


def median_round(rounds: int, run: Callable[[Callable[[], None]], None]) -> dict[str, Any]:
    """Of `rounds` calls of `one_round`: the medians, and each of them."""
    measured = [one_round(run) for _ in range(rounds)]
    return {name: statistics.median(r[name] for r in measured) for name in measured[0]} | {"rounds_s": measured}


def _latency(case: Case, model, method, chunk: int) -> dict[str, Any]:
    from unigist_jax.inference import generate

    tokens = np.random.default_rng(0).integers(0, case.config.vocab_size, (case.batch, case.context)).tolist()
    cache_bytes = 0

    def run(on_token: Callable[[], None], length: int = case.context, new_tokens: int = case.new_tokens) -> None:
        nonlocal cache_bytes
        prompts = tokens if length == case.context else [row[:length] for row in tokens]
        generated = generate(
            model, prompts, max_new_tokens=new_tokens, method=case.system, chunk_size=chunk,
            capacity=case.context + case.new_tokens, on_token=lambda sequence, _: sequence or on_token(),
        )  # fmt: skip
        cache_bytes = generated.cache.nbytes

    start = time.perf_counter()
    # what reads in chunks is compiled for the length of a chunk, the rest for that of a prompt
    run(lambda: None, min(case.context, chunk) if method.extend else case.context, min(case.new_tokens, 10))
    first = time.perf_counter() - start
    timed = median_round(case.rounds, run)
    return {"first_call_s": first, "chunk_size": chunk, **timed, "cache_bytes": cache_bytes}


def _chunks(case: Case, model, method, chunk: int) -> dict[str, Any]:
    import jax

    tokens = np.random.default_rng(0).integers(0, case.config.vocab_size, (case.batch, case.context)).tolist()
    seconds = {}
    for size in case.chunk_sizes or (chunk,):
        for prompts in ([row[:size] for row in tokens], tokens):
            start = time.perf_counter()
            logits, cache = method.prefill(model, prompts, capacity=case.context, chunk_size=size)
            jax.block_until_ready(logits)
            seconds[str(size)] = time.perf_counter() - start
    return {"seconds_by_chunk": seconds, "cache_bytes": cache.nbytes}


def _decode(case: Case, model, method, chunk: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from unigist_jax.inference.generate import continue_from
    from unigist_jax.inference.prefill import prefill_chunk

    generated = (case.rounds + 1) * case.new_tokens
    held, capacity = (case.context - generated, case.context)
    if case.kind == "limit":
        held, capacity = case.context - chunk, case.context + generated
    begin = time.perf_counter()
    cache = method.prefill(model, [[1] * min(chunk, held)], capacity=capacity, chunk_size=chunk)[1]
    batch = case.batch or most_sequences(model, cache)
    cache = random_cache(cache, batch, held)
    result = {"cache_bytes": cache.nbytes, "capacity": cache.capacity, "batch": batch}
    if case.kind == "limit":
        ratio = case.ratio or 1
        tokens, lengths = jnp.ones((batch, chunk), jnp.int32), jnp.full((batch,), case.context, jnp.int32)
        for _ in range(2):  # the second time over the first one's result
            start = time.perf_counter()
            hidden, cache = prefill_chunk(model, cache, tokens, jnp.int32(held // ratio), lengths)
            jax.block_until_ready(hidden)
        result |= {"last_chunk_s": time.perf_counter() - start, "chunk_size": chunk}
        del hidden
    logits = jnp.zeros((batch, case.config.vocab_size), jnp.float32)
    seconds = []
    for _ in range(case.rounds + 1):
        start = time.perf_counter()
        cache = continue_from(model, method, logits, cache, case.new_tokens).cache
        jax.block_until_ready(cache)
        seconds.append(time.perf_counter() - start)
        result.setdefault("first_call_s", time.perf_counter() - begin)
    step = statistics.median(seconds[1:]) / (case.new_tokens - 1)  # the first token comes of the logits
    return result | {"tpot_s": step, "tokens_s": batch / step, "rounds_s": seconds[1:]}


def most_sequences(model, cache) -> int:
    """Sequences whose caches, each as large as that of the given one's only sequence, fit beside the weights."""
    import jax

    weights, held = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (model, cache.layers))
    stats = jax.devices()[0].memory_stats() or {"bytes_limit": weights + RESERVE_BYTES + 3 * held}
    return (stats["bytes_limit"] - weights - RESERVE_BYTES) // held


def random_cache(cache, batch: int, length: int):
    """A cache as if `batch` sequences of `length` tokens had been read; of the given one's shapes, consuming it."""
    import jax
    import jax.numpy as jnp

    def filled(old, seed):
        like = jax.ShapeDtypeStruct((batch, *old.shape[1:]), old.dtype)
        old.delete()
        return noise(seed, like, 1.0)

    leaves, tree = jax.tree.flatten(cache.layers)
    layers = jax.tree.unflatten(tree, [filled(leaf, seed) for seed, leaf in enumerate(leaves)])
    return dataclasses.replace(cache, layers=layers, length=jnp.full((batch,), length, jnp.int32))


def main() -> None:
    """Measures the case of the command line and writes the result, or the error."""
    fields = json.loads(sys.argv[1])
    case = Case(**fields | {"chunk_sizes": tuple(fields.get("chunk_sizes", ()))})
    start = time.perf_counter()
    try:
        if case.system == "transformers":
            from launch.inference_peer import measure_transformers

            result = measure_transformers(case)
        else:
            result = measure(case)
    except Exception as error:  # whatever it is, the other cases go on
        result = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:400]}
    result["process_s"] = time.perf_counter() - start
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
