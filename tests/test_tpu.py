"""The TPU backend, on machines without a TPU.

- Numbers: the kernels in Pallas's TPU interpreter, which keeps memories and copies apart as a TPU does, fills fresh
  memory with NaN and watches for races, against the float32 oracle. Tiles are small so that short inputs have many.
- Tables: what they cover, against the oracle's mask; and the cost estimates against the tables.
- Compilation by the real TPU compiler for v5e, v5p and v6e, where libtpu is installed (`make test-tpu`).
"""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from pallas_kernels import gist_attention, reference, tpu
from pallas_kernels.backends import compiling_for, usable_backends
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.gist_attention import GistKV
from pallas_kernels.tpu import cost, plan
from pallas_kernels.tpu.blocks import TABLE, Blocks, blocks_for
from unigist_jax.layout import GistLayout, document_starts, split_segment, unit_starts

SMALL = Blocks(rows=16, columns=48, keys=32, part=16)


def random_inputs(rng, layout, num_units, num_gists, num_raws, batch, heads, kv_heads, dim, dtype):
    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)

    q_shape = (batch, (layout.ratio + 1) * num_units, heads, dim)
    lengths = ((layout.num_sinks,), (batch, num_gists), (batch, num_raws))
    kv = GistKV(*(array(*length, kv_heads, dim) for length in lengths for _ in (0, 1)))
    return array(*q_shape), kv, array(*q_shape)


def odd_documents(rng, batch, num_units):
    """Starts of documents of odd lengths that differ between sequences."""
    ids = [np.repeat(np.arange(num_units), rng.choice([1, 3, 5, 7], num_units))[:num_units] for _ in range(batch)]
    return jnp.asarray(document_starts(np.stack(ids)))


@pytest.fixture
def interpreted(capfd):
    """A context that runs kernels in the interpreter on some simulated cores; a race that it reports fails the test."""

    def context(cores=1):
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=cores))

    yield context
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out


# --- numbers ----------------------------------------------------------------------------------------------------------

# the grid of all backends; a TPU has no fp16
GRID = {
    name: case._replace(dtype="bfloat16") if case.dtype == "float16" else case
    for name, case in kernel_cases.elsewhere()
}


@pytest.mark.parametrize("name", [name for name in GRID if name in kernel_cases.ATTENTION])
def test_attention_and_gradients_match_the_oracle(name, interpreted):
    case = GRID[name]
    given = kernel_cases.inputs(case)
    attend = kernel_cases.direct(functools.partial(tpu.attend, blocks=SMALL))
    with interpreted(case.batch):
        found = jax.block_until_ready(kernel_cases.compiled(attend, case, given)(given))
    assert {x.dtype for x in found.values()} == {jnp.dtype(case.dtype)}
    kernel_cases.check(found, case)


def test_chunks_equal_one_pass(interpreted):
    layout, units, cut = GistLayout(4, 3, 8), 7, 4
    q, kv, _ = random_inputs(np.random.default_rng(1), layout, units, units, 4 * units, 1, 2, 1, 64, jnp.float32)

    @functools.partial(jax.jit, static_argnums=2)
    def run(q, first, count):
        with interpreted():
            return tpu.attend(q, kv, layout, first, 0, unit_starts(layout, count, first), blocks=SMALL)

    whole = split_segment(run(q, 0, units), layout, axis=1)
    raws, gists = split_segment(q, layout, axis=1)
    for first, last in ((0, cut), (cut, units)):
        of_raws, of_gists = slice(4 * first, 4 * last), slice(first, last)
        part = run(jnp.concatenate([raws[:, of_raws], gists[:, of_gists]], axis=1), first, last - first)
        expected = jnp.concatenate([whole[0][:, of_raws], whole[1][:, of_gists]], axis=1)
        assert kernel_cases.relative(part, expected) < kernel_cases.TOLERANCE["float32"]


@pytest.mark.parametrize("name", [name for name in GRID if name in kernel_cases.DECODING])
def test_decoding_matches_the_oracle(name, interpreted):
    case = GRID[name]
    given = kernel_cases.decode_inputs(case)
    decode = functools.partial(tpu.decode, entries=32)
    with interpreted(len(case.raw_index)):
        found = jax.block_until_ready(kernel_cases.decoded(decode, case, given))
    kernel_cases.check_decoding(found, case, given)


def test_the_interpreter_would_report_a_race(capfd):
    """What `interpreted` relies on: a copy that nobody waits for is reported in these words."""

    def kernel(x_ref, out_ref, buffer, sem):
        copy = pltpu.make_async_copy(x_ref, buffer, sem)
        copy.start()
        out_ref[...] = buffer[...]
        copy.wait()

    x = jnp.ones((8, 128), jnp.float32)
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="eager")
    run = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM)],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA(())],
        interpret=params,
    )
    jax.block_until_ready(run(x))
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" in capfd.readouterr().out


# --- tables and costs -------------------------------------------------------------------------------------------------


def plan_of(layout, units, heads, starts, blocks, gists=None, raws=None, first=0, first_raw=0):
    """Segment, key axis and both tables."""
    gists, raws = gists or units, raws or units * layout.ratio
    kv = GistKV(
        *(
            jax.ShapeDtypeStruct((*n, 1, 64), jnp.float32)
            for n in ((layout.num_sinks,), (1, gists), (1, raws))
            for _ in (0, 1)
        )
    )
    segment, axis = plan.cut((1, layout.segment_length(units), heads, 64), kv, layout, blocks)

    @jax.jit
    def tables(starts):
        intervals = plan.row_intervals(layout, segment, axis, first, first_raw, starts)
        table = plan.key_table(segment, axis, intervals)
        return table, plan.query_table(segment, axis, table)

    return segment, axis, *tables(starts)


def visited_pairs(table, axis) -> np.ndarray:
    """Which key tiles each query tile of a table visits, and which of them without a mask: two bool [S, M, N]."""
    tile = np.arange(axis.tiles)
    full = tile < table[..., :1]
    visited = np.broadcast_to(tile < axis.sink_tiles, full.shape).copy()
    for run in (plan.GISTS, plan.RAWS):
        first, full_first, full_last, last = (table[..., run + i, None] for i in range(4))
        visited |= (tile >= first) & (tile < last)
        full |= (tile >= full_first) & (tile < full_last)
    return visited, full


@pytest.mark.parametrize(
    ("ratio", "num_units", "sinks", "batch", "packed"),
    [(4, 200, 5, 2, True), (2, 127, 0, 1, False), (8, 1, 130, 1, False), (4, 160, 64, 1, False)],
)
def test_tables_cover_the_mask_and_nothing_unmasked_is_hidden(ratio, num_units, sinks, batch, packed):
    layout = GistLayout(ratio, sinks, 8 * ratio)
    doc_start = odd_documents(np.random.default_rng(num_units), batch, num_units) if packed else None
    starts = unit_starts(layout, num_units, jnp.int32(0), doc_start)
    segment, axis, table, visitors = plan_of(layout, num_units, 2, starts, Blocks(32, 64, 64))
    mask = np.asarray(reference.visibility_mask(layout, num_units, sinks, num_units, num_units * ratio, 0, 0, starts))
    valid, keys = segment.valid_rows(), np.zeros(axis.tiles * axis.keys, bool)
    keys[: sinks + num_units] = True
    keys[axis.raw_tile * axis.keys :][: num_units * ratio] = True
    padded = np.zeros((len(mask), len(valid), len(keys)), bool)
    padded[np.ix_(range(len(mask)), valid, keys)] = mask
    tiles = padded.reshape(len(mask), segment.tiles, segment.rows, axis.tiles, axis.keys).swapaxes(2, 3)
    all_seen = (tiles | ~valid.reshape(-1, 1, segment.rows, 1)).all((3, 4))
    visited, full = visited_pairs(np.asarray(table), axis)
    assert not (tiles.any((3, 4)) & ~visited).any()
    assert not (full & ~all_seen).any()
    query = np.arange(segment.tiles)[:, None]
    a, b, c, d = np.moveaxis(np.asarray(visitors), -1, 0)[:, :, None]
    seen_by = ((query >= a) & (query < b)) | ((query >= c) & (query < d))
    assert not (tiles.any((3, 4)) & ~seen_by).any()
    if not packed:
        assert (seen_by == visited).all(), "both directions compute the same pairs"


@pytest.mark.parametrize(
    ("ratio", "units", "gists", "sinks", "window"),
    [(4, 300, 300, 128, 128), (2, 40, 333, 0, 0), (16, 64, 500, 5, 64), (8, 100, 100, 0, 64)],
)
def test_the_cost_estimate_counts_what_the_tables_visit(ratio, units, gists, sinks, window):
    layout, first = GistLayout(ratio, sinks, window), gists - units
    first_raw = max(0, first - layout.window_units)
    starts = unit_starts(layout, units, jnp.int32(first))
    raws = (gists - first_raw) * ratio
    segment, axis, table, _ = plan_of(layout, units, 2, starts, Blocks(32, 64, 64), gists, raws, first, first_raw)
    assert cost.visits(layout, segment, axis) == visited_pairs(np.asarray(table), axis)[0].sum()


def test_every_shape_has_blocks_and_tiles_of_whole_registers():
    for dim in (64, 128):
        for ratio in (2, 4, 8, 16, 32):
            for length in (1, 4096, 131072, 2**22):
                blocks = blocks_for(dim, ratio, length)
                assert blocks.rows % 128 == 0 and blocks.keys % 128 == 0
    assert {row[0] for row in TABLE} == {64, 128}
    assert [Blocks(128, 512, 512).heads(group) for group in (1, 4, 6, 7, 8)] == [1, 4, 3, 1, 4]


# --- the choice of a backend ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "dim", "ratio", "said"),
    [(jnp.float16, 128, 4, "float16"), (jnp.bfloat16, 96, 4, "96"), (jnp.bfloat16, 128, 3, "ratios")],
)
def test_refusals_name_the_value(dtype, dim, ratio, said):
    layout = GistLayout(ratio, 8, 0)
    q, kv, _ = random_inputs(np.random.default_rng(0), layout, 2, 2, 2 * ratio, 1, 2, 1, dim, dtype)
    assert said in tpu.refusal(q, kv, layout)
    assert said in tpu.decode_refusal(q, kv, layout)


def test_refuses_more_tiles_than_scalar_memory_lists():
    layout, units = GistLayout(4, 0, 0), 2**21
    q = jax.ShapeDtypeStruct((8, 5 * units, 4, 64), jnp.bfloat16)
    shapes = ((0,), (8, units), (8, 4 * units))
    kv = GistKV(*(jax.ShapeDtypeStruct((*n, 1, 64), jnp.bfloat16) for n in shapes for _ in (0, 1)))
    assert "query tiles" in tpu.refusal(q, kv, layout)
    assert tpu.refusal(jax.ShapeDtypeStruct((1, 5 * 2**15, 4, 64), jnp.bfloat16), kv, layout) is None


def test_without_a_tpu_it_is_refused_by_name():
    layout = GistLayout(4, 8, 0)
    q, kv, _ = random_inputs(np.random.default_rng(0), layout, 2, 2, 8, 1, 2, 1, 64, jnp.float32)
    with pytest.raises(ValueError, match=r'backend="tpu" needs a TPU, this is cpu; here "blocked"'):
        gist_attention(q, kv, layout, backend="tpu")


# --- compilation for a TPU on a machine without one -------------------------------------------------------------------

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: make test-tpu installs libtpu"
)


@pytest.fixture(scope="module", params=CHIPS)
def chip(request):
    """A device of an ahead-of-time topology; while it lives, backends are chosen for it."""
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    device = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[request.param]).devices[0]
    with compiling_for(device):
        yield device


def shapes_for(device, dim, layout, num_raws, batch=1, heads=32, kv_heads=8, gists=None, dtype=jnp.bfloat16):
    place = SingleDeviceSharding(device)

    def shaped(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    lengths = (layout.num_sinks,), (batch, gists or num_raws // layout.ratio), (batch, num_raws)
    kv = GistKV(*(shaped(*length, kv_heads, dim) for length in lengths for _ in (0, 1)))
    return shaped, kv


def kernels_of(compiled) -> set[str]:
    return set(re.findall(r"gist_attention_(?:forward|backward_q|backward_kv|decode)", compiled.as_text()))


@needs_libtpu
@pytest.mark.parametrize("length", [4096, 32768])
@pytest.mark.parametrize("ratio", [4, 8])
@pytest.mark.parametrize("dim", [64, 128])
def test_compiles_forward_and_backward(chip, dim, ratio, length):
    layout = GistLayout(ratio, 128, 128)
    shaped, kv = shapes_for(chip, dim, layout, length)
    q = shaped(1, layout.segment_length(length // ratio), 32, dim)
    attend = functools.partial(gist_attention, layout=layout)  # the default on a TPU
    compiled = jax.jit(lambda q, kv, d: jax.vjp(attend, q, kv)[1](d)).lower(q, kv, q).compile()
    assert kernels_of(compiled) == {f"gist_attention_{x}" for x in ("forward", "backward_q", "backward_kv")}
    # a constant times the inputs, at any length: nothing has both a query and a key axis
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 6 * memory.argument_size_in_bytes


@needs_libtpu
@pytest.mark.parametrize(
    ("ratio", "sinks", "window", "heads", "kv_heads", "dtype"),
    [(2, 0, 0, 6, 2, jnp.float32), (16, 5, 64, 8, 8, jnp.bfloat16), (32, 130, 0, 32, 1, jnp.bfloat16)],
    ids=["float32, no sinks", "a KV head each", "group of 32"],
)
def test_compiles_documents_and_chunks_of_a_cache(chip, ratio, sinks, window, heads, kv_heads, dtype):
    layout, units, batch = GistLayout(ratio, sinks, window), 96, 2
    gists, raws = 300, window + units * ratio
    shaped, kv = shapes_for(chip, 128, layout, raws, batch, heads, kv_heads, gists, dtype)
    q = shaped(batch, layout.segment_length(units), heads, 128)
    scalar, doc_start = shaped(dtype=jnp.int32), shaped(batch, gists, dtype=jnp.int32)

    def gradients(q, kv, d_out, first, first_raw, doc_start):
        return jax.vjp(lambda q, kv: gist_attention(q, kv, layout, first, first_raw, doc_start), q, kv)[1](d_out)

    compiled = jax.jit(gradients).lower(q, kv, q, scalar, scalar, doc_start).compile()
    assert kernels_of(compiled) == {f"gist_attention_{x}" for x in ("forward", "backward_q", "backward_kv")}


@needs_libtpu
@pytest.mark.parametrize(
    ("dim", "batch", "gists", "heads", "kv_heads", "dtype"),
    [
        (128, 1, 8192, 32, 8, jnp.bfloat16),
        (64, 16, 9999, 32, 8, jnp.bfloat16),
        (128, 4, 1024, 32, 32, jnp.float32),
        (128, 2, 333, 6, 3, jnp.bfloat16),
    ],
    ids=["one sequence", "dim 64", "float32, a KV head each", "three KV heads"],
)
def test_compiles_decode(chip, dim, batch, gists, heads, kv_heads, dtype):
    layout = GistLayout(4, 128, 128)
    shaped, kv = shapes_for(chip, dim, layout, layout.window + layout.ratio, batch, heads, kv_heads, gists, dtype)
    args = shaped(batch, 2, heads, dim), kv, shaped(batch, dtype=jnp.int32)
    compiled = jax.jit(lambda q, kv, i: decode_attention(q, kv, layout, i)).lower(*args).compile()
    assert kernels_of(compiled) == {"gist_attention_decode"}
    if kv_heads % 8 == 0:  # the cache is read in place
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes < 0.05 * memory.argument_size_in_bytes


@needs_libtpu
def test_is_the_default_on_a_tpu(chip):
    assert usable_backends() == ["tpu", "blocked", "reference"]
