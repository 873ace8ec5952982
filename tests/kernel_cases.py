"""The grid of cases that every attention backend is held to, and the routine that runs one of them.

Axis legend
  B  batch      Hq  query heads, Hkv  KV heads, D  head dim      U  units of the segment, G  gist keys, R  raw keys

A case gives the shapes of inputs, `values` runs a backend on them forward and backward, and `check` compares every part
with the oracle in float32: output, and the gradients of queries, sinks, gists and raws. Small cases run on any machine;
the others reach across the tiles of GPU kernels.
"""

from __future__ import annotations

import functools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import GistKV, blocked, decode_attention, gist_attention, reference
from unigist_jax.layout import GistLayout, document_starts, unit_starts

TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3, "float32": 1e-5}
PARTS = "out", "d_q", *(f"d_{name}" for name in GistKV._fields)


class Case(NamedTuple):
    """Sizes of a case of attention. documents: None, "random" lengths, or lengths in units.

    first_unit: the segment's first unit; gists: gists given, a cache with room; chunk: units of a chunk window.
    """

    units: int
    ratio: int = 4
    sinks: int = 128
    window: int = 128
    dim: int = 128
    heads: int = 8
    kv_heads: int = 2
    batch: int = 1
    dtype: str = "bfloat16"
    documents: str | tuple[int, ...] | None = None
    first_unit: int = 0
    gists: int | None = None
    chunk: int | None = None
    small: bool = False

    @property
    def layout(self) -> GistLayout:
        return GistLayout(self.ratio, self.sinks, self.window)

    @property
    def first_raw_unit(self) -> int:
        return max(0, self.first_unit - self.layout.window_units)


def small(units: int, **sizes) -> Case:
    """A case that a CPU runs in about a second."""
    few = {"sinks": 5, "window": 8, "dim": 64, "heads": 2, "kv_heads": 1, "small": True}
    return Case(units, **(few | sizes))


ATTENTION = {
    "one unit": small(1),
    "one unit, no sinks, no window": small(1, ratio=2, sinks=0, window=0),
    "a document a unit": small(7, ratio=2, window=4, documents=(1,) * 7),
    "documents of odd lengths, two sequences": small(9, batch=2, documents=(1, 3, 5), heads=3),
    "below a tile, no sinks": small(15, ratio=2, sinks=0, heads=1),
    "above a tile, no window": small(17, ratio=2, window=0, heads=1, sinks=17),
    "documents, ratio 8, no window": small(7, ratio=8, window=0, documents=(4, 1, 2), kv_heads=2),
    "ratio 32": small(2, ratio=32, window=32, heads=1),
    "ratio 16, float16": small(3, ratio=16, window=16, dtype="float16"),
    "group of 16": small(2, window=4, heads=16),
    "group of 5, chunk windows": small(6, chunk=3, heads=5, kv_heads=1),
    "chunk in the middle of a cache": small(6, first_unit=7, gists=17),
    "chunk of documents in a cache": small(6, first_unit=7, gists=16, documents=(3, 7, 6)),
    "chunk windows and documents": small(7, chunk=3, documents=(2, 5)),
    "head dim 128": small(3, dim=128),
    "128 sinks, one unit": Case(1),
    "128 sinks, one unit, no window": Case(1, ratio=2, window=0),
    "just below a tile of units": Case(127, ratio=2, batch=2),
    "a tile of units": Case(128),
    "just above a tile of units": Case(129, ratio=2, window=64, heads=6),
    "ratio 8 on 256 units": Case(256, ratio=8),
    "ratio 16 on 40 units, no window": Case(40, ratio=16, window=0),
    "ratio 32 on 20 units": Case(20, ratio=32),
    "odd sinks": Case(33, sinks=5),
    "head dim 64, 130 sinks": Case(140, dim=64, sinks=130),
    "a head each, head dim 64": Case(128, dim=64, heads=3, kv_heads=3, documents="random"),
    "float16, group of 16, 130 units": Case(130, dtype="float16", heads=16, kv_heads=1),
    "documents that differ between sequences": Case(200, batch=2, documents="random"),
    "a document a unit, 150 units": Case(150, documents=(1,) * 150),
    "documents, no sinks, no window": Case(300, ratio=2, sinks=0, window=0, heads=2, documents="random"),
    "chunk of 64 units in a cache of 180": Case(64, first_unit=70, gists=180),
    "chunk windows of 64 units": Case(256, chunk=64),
    "many tiles": Case(1024, heads=4, kv_heads=1, documents="random"),
}


class Decoding(NamedTuple):
    """Sizes of a decoding step; raw_index: the newest raw of each sequence; spare: needless ring slots."""

    raw_index: tuple[int, ...]
    gists: int
    ratio: int = 4
    sinks: int = 128
    window: int = 128
    dim: int = 128
    heads: int = 32
    kv_heads: int = 8
    dtype: str = "bfloat16"
    spare: int = 0
    small: bool = False

    @property
    def layout(self) -> GistLayout:
        return GistLayout(self.ratio, self.sinks, self.window)


FEW = {"dim": 64, "heads": 4, "kv_heads": 2, "window": 8, "sinks": 5, "small": True}

DECODING = {
    "ragged, every phase of a unit": Decoding((0, 2, 3, 43, 63), 40, spare=4, **FEW),
    "every raw a gist: full attention": Decoding((0, 3, 40), 41, ratio=1, spare=7, **(FEW | {"sinks": 0, "window": 0})),
    "no sinks, no window": Decoding((0, 7, 71), 9, ratio=8, **(FEW | {"sinks": 0, "window": 0})),
    "group of 16, float16": Decoding((100,), 33, **(FEW | {"heads": 16, "kv_heads": 1, "dtype": "float16"})),
    "ragged over many tiles": Decoding((0, 5, 777, 1199), 304, spare=4),
    "a head each, no sinks": Decoding((3, 559), 70, ratio=8, sinks=0, window=0, dim=64, heads=4, kv_heads=4),
    "group of 32": Decoding((1000, 1001, 3999), 1000, sinks=5, window=64, kv_heads=1),
    "group of 3, float16": Decoding((515,), 129, heads=6, kv_heads=2, dtype="float16"),
    "batch of 64": Decoding(tuple(61 * i for i in range(64)), 1000, heads=8, kv_heads=2),
    "many tiles a block, ragged": Decoding((40000, 5, 400), 16384, spare=4),
    "many tiles a block, head dim 64": Decoding((40000, 5, 400), 16384, dim=64, spare=4),
}


def elsewhere():
    """Names and cases that a backend runs without its device: the small ones, with float32 in the place of bfloat16
    (which Triton's interpreter cannot multiply), so that they are held to float32's tolerance."""
    for name, case in (ATTENTION | DECODING).items():
        if case.small:
            yield name, case._replace(dtype="float32") if case.dtype == "bfloat16" else case


def seed_of(case) -> int:
    """A seed that a case keeps between processes."""
    return zlib.crc32(repr(case).encode())


def normal(rng, dtype, *shape) -> jax.Array:
    return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), jnp.dtype(dtype))


class Inputs(NamedTuple):
    """Arguments of the op for a case, and a cotangent of its output."""

    q: jax.Array
    kv: GistKV
    cotangent: jax.Array
    first_unit: jax.Array
    first_raw_unit: jax.Array
    doc_start: jax.Array | None
    raw_start: jax.Array | None


def random_documents(rng, batch: int, num_units: int) -> jax.Array:
    """doc_start [B, U] of random documents, some of 1 unit, the first of 3 at most."""
    ids = np.cumsum(rng.random((batch, num_units)) < 0.03, axis=1)
    ids[:, 3:] += 1
    return jnp.asarray(document_starts(ids))


def documents_of(rng, case: Case, num_gists: int) -> jax.Array | None:
    """doc_start [B, G] of a case."""
    if case.documents is None:
        return None
    if case.documents == "random":
        return random_documents(rng, case.batch, num_gists)
    ids = np.repeat(np.arange(len(case.documents)), case.documents)
    return jnp.asarray(document_starts(ids[None].repeat(case.batch, 0)))


def inputs(case: Case, seed: int | None = None) -> Inputs:
    """Normal inputs of a case; None: those of `seed_of`."""
    rng = np.random.default_rng(seed_of(case) if seed is None else seed)
    num_gists = case.gists or case.units
    num_raws = (case.first_unit + case.units - case.first_raw_unit) * case.ratio
    lengths = (case.sinks,), (case.batch, num_gists), (case.batch, num_raws)
    kv = GistKV(*(normal(rng, case.dtype, *n, case.kv_heads, case.dim) for n in lengths for _ in (0, 1)))
    shape = case.batch, (case.ratio + 1) * case.units, case.heads, case.dim
    raw_start = None
    if case.chunk:
        raw_start = (jnp.arange(num_gists, dtype=jnp.int32) // case.chunk * case.chunk)[None].repeat(case.batch, 0)
    doc_start = documents_of(rng, case, num_gists)
    q, cotangent = (normal(rng, case.dtype, *shape) for _ in (0, 1))
    return Inputs(q, kv, cotangent, jnp.int32(case.first_unit), jnp.int32(case.first_raw_unit), doc_start, raw_start)


def public(backend: str):
    """The public op with a backend, as `values` takes it."""

    def attend(q, kv, layout, first_unit, first_raw_unit, doc_start, raw_start):
        return gist_attention(q, kv, layout, first_unit, first_raw_unit, doc_start, raw_start, backend)

    return attend


def direct(module_attend):
    """A backend's own `attend`, which takes `UnitStarts`, as `values` takes it."""

    def attend(q, kv, layout, first_unit, first_raw_unit, doc_start, raw_start):
        units = layout.segment_units(q.shape[1])

        def part(x):
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, first_unit, units, axis=1)

        starts = unit_starts(layout, units, first_unit, part(doc_start), part(raw_start))
        return module_attend(q, kv, layout, first_unit, first_raw_unit, starts)

    return attend


def compiled(attend, case: Case, given: Inputs):
    """A function from a case's inputs to its output and gradients, by `PARTS`; the first units are traced."""

    @jax.jit
    def of(q, kv, cotangent, first_unit, first_raw_unit):
        def output(q, kv):
            return attend(q, kv, case.layout, first_unit, first_raw_unit, given.doc_start, given.raw_start)

        out, vjp = jax.vjp(output, q, kv)
        d_q, d_kv = vjp(cotangent)
        return dict(zip(PARTS, (out, d_q, *d_kv), strict=True))

    return lambda given: of(*given[:5])


def values(attend, case: Case, given: Inputs) -> dict[str, jax.Array]:
    """Output and gradients of a case, by `PARTS`."""
    return compiled(attend, case, given)(given)


def on_cpu(tree, dtype=None):
    """Arrays on the CPU, floating ones as `dtype`."""

    def move(x):
        x = jnp.asarray(x, dtype) if dtype and jnp.issubdtype(x.dtype, jnp.floating) else x
        return jax.device_put(x, jax.devices("cpu")[0])

    return jax.tree.map(move, tree)


def relative(x, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    x, expected = (np.asarray(jax.device_get(a)).astype(np.float64) for a in (x, expected))
    return float(np.linalg.norm(x - expected) / max(np.linalg.norm(expected), 1e-30)) if expected.size else 0.0


@functools.lru_cache(maxsize=64)
def expected(case: Case, seed: int | None = None) -> dict[str, np.ndarray]:
    """What the oracle gives in float32 on a case's inputs."""
    return jax.device_get(values(direct(reference.attend), case, on_cpu(inputs(case, seed), jnp.float32)))


def check(found: dict, case: Case, seed: int | None = None) -> None:
    """Holds every part to the float32 oracle on the same inputs.

    A part may exceed the tolerance of its dtype only where the rounding of inputs and output to that dtype explains it:
    gradients that are differences of nearly equal numbers. There the yardstick is the blocked path in the same dtype.
    """
    oracle = expected(case, seed)
    errors = {part: relative(found[part], oracle[part]) for part in PARTS}
    bound = TOLERANCE[case.dtype]
    if any(not error < bound for error in errors.values()):
        rounded = values(direct(blocked.attend), case, on_cpu(inputs(case, seed)))
        rounding = {part: relative(rounded[part], oracle[part]) for part in PARTS}
        above = {part: error for part, error in errors.items() if not error < max(bound, 1.5 * rounding[part])}
        assert not above, f"relative errors {above} above {bound}; rounding alone gives {rounding}"


def decode_inputs(case: Decoding, seed: int | None = None):
    """q [B, 2, Hq, D], kv and raw_index [B] of a decoding case."""
    rng = np.random.default_rng(seed_of(case) if seed is None else seed)
    batch = len(case.raw_index)
    lengths = (case.sinks,), (batch, case.gists), (batch, case.window + case.ratio + case.spare)
    kv = GistKV(*(normal(rng, case.dtype, *n, case.kv_heads, case.dim) for n in lengths for _ in (0, 1)))
    return normal(rng, case.dtype, batch, 2, case.heads, case.dim), kv, jnp.asarray(case.raw_index, jnp.int32)


def public_decode(backend: str):
    """The public decoding op with a backend, as `decoded` takes it."""
    return lambda q, kv, layout, raw_index: decode_attention(q, kv, layout, raw_index, backend)


def decoded(decode, case: Decoding, given) -> jax.Array:
    """Output of a decoding case."""
    return jax.jit(lambda q, kv, raw_index: decode(q, kv, case.layout, raw_index))(*given)


def check_decoding(found, case: Decoding, given) -> None:
    """Holds a decoding step to the float32 oracle."""
    expected = decoded(reference.decode, case, on_cpu(given, jnp.float32))
    assert relative(found, expected) < TOLERANCE[case.dtype]
