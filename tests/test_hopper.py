"""The Hopper backend on any machine: what it refuses, its tables, and (where jax's CUDA plugin is installed) that it
compiles for an H100 without a GPU. Its numbers are held to the oracle on a GPU by test_kernels.py, and here with the
backward pass's walks cut into pieces (`python -m pytest --noconftest tests/test_hopper.py -k gpu`).
"""

import functools
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels import GistKV, reference
from unigist_jax.layout import GistLayout, unit_starts

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
hopper = pytest.importorskip("pallas_kernels.hopper")
plan = pytest.importorskip("pallas_kernels.hopper.plan")
blocks_of = pytest.importorskip("pallas_kernels.hopper.blocks")
decode = pytest.importorskip("pallas_kernels.hopper.decode")
forward, backward = (pytest.importorskip(f"pallas_kernels.hopper.{name}") for name in ("forward", "backward"))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "dim", "ratio", "said", "decodes"),
    [("float32", 128, 4, "float32", False), ("bfloat16", 96, 4, "96", False), ("bfloat16", 128, 3, "ratios", True)],
)
def test_refusals_name_the_value(dtype, dim, ratio, said, decodes):
    case = kernel_cases.small(2, ratio=ratio, window=0, dim=dim, dtype=dtype)
    q, kv = kernel_cases.inputs(case)[:2]
    assert said in hopper.refusal(q, kv, case.layout)
    reason = hopper.decode_refusal(q, kv, case.layout)
    assert reason is None if decodes else said in reason


def test_refuses_mixed_dtypes_and_too_many_heads_to_decode():
    case = kernel_cases.small(2, heads=33)
    q, kv = kernel_cases.inputs(case)[:2]
    assert hopper.refusal(q, kv, case.layout) is None
    assert "got 33" in hopper.decode_refusal(q, kv, case.layout)
    assert hopper.decode_refusal(q[:, :, :32], kv, case.layout) is None
    assert "float16" in hopper.refusal(q.astype(jnp.float16), kv, case.layout)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "num_units", "batch", "packed"), [(4, 200, 2, True), (2, 127, 1, False), (8, 1, 1, False)]
)
def test_tables_cover_the_mask_and_nothing_unmasked_is_hidden(ratio, num_units, batch, packed):
    rng = np.random.default_rng(num_units)
    layout = GistLayout(ratio, 5, 8 * ratio)
    doc_start = kernel_cases.random_documents(rng, batch, num_units) if packed else None
    starts = unit_starts(layout, num_units, jnp.int32(0), doc_start)
    segment = plan.segment_of(layout, (ratio + 1) * num_units)
    intervals = plan.row_intervals(layout, segment, 0, 0, starts)
    mask = np.asarray(reference.visibility_mask(layout, num_units, 0, num_units, num_units * ratio, 0, 0, starts))
    valid = plan._valid_rows(segment)
    tile, keys = 64, 128
    for name, at, lo, hi in (
        ("gists", slice(0, num_units), intervals.gist_lo, intervals.gist_hi),
        ("raws", slice(num_units, None), intervals.raw_lo, intervals.raw_hi),
    ):
        padded = np.zeros((len(lo), segment.rows, -(-mask[..., at].shape[-1] // keys) * keys), bool)
        padded[:, valid, : mask[..., at].shape[-1]] = mask[..., at]
        bounds = plan.tile_bounds(segment, plan.RowRanges(lo, hi), tile, keys)
        visitors = np.asarray(plan.visitors(segment, bounds, padded.shape[2] // keys, tile))
        for s in range(len(lo)):
            tiles = padded[s].reshape(segment.rows // tile, tile, -1, keys).swapaxes(1, 2)
            seen, all_seen = tiles.any((2, 3)), (tiles | ~valid.reshape(-1, 1, tile, 1)).all((2, 3))
            for m, (first, full_first, full_last, last) in enumerate(np.stack([x[s] for x in bounds], -1)):
                assert not seen[m, :first].any() and not seen[m, last:].any(), name
                assert all_seen[m, full_first:full_last].all(), name
            for n, (a, b, c, d) in enumerate(visitors[s]):
                visited = np.zeros(len(seen), bool)
                visited[a:b] = visited[c:d] = True
                assert not (seen[:, n] & ~visited).any(), name


def test_each_query_tile_counts_the_key_tiles_that_add_to_its_gradient():
    """The numbers by which the backward pass waits its turn: 0, 1, 2, … for each query tile, the sinks' tiles first."""
    rng = np.random.default_rng(0)
    num_units, tile, keys = 300, 64, 128
    layout = GistLayout(4, 130, 32)
    doc_start = kernel_cases.random_documents(rng, 2, num_units)
    segment = plan.segment_of(layout, 5 * num_units)
    intervals = plan.row_intervals(layout, segment, 0, 0, unit_starts(layout, num_units, jnp.int32(0), doc_start))
    none = jnp.zeros_like(intervals.gist_lo)
    pairs = (none, none + 130), intervals[:2], intervals[2:]
    counts = tuple(-(-x // keys) for x in (130, num_units, 4 * num_units))
    ranges = [plan.RowRanges(*x) for x in pairs]
    of_source = [(source, n) for source in range(3) for n in range(counts[source])]
    whole = np.asarray(plan.backward_tables(segment, ranges, counts, tile, keys, 1, 0)[0])
    for num_cut in (counts[0], counts[0] + counts[1]):
        walks, tiles = plan.backward_tables(segment, ranges, counts, tile, keys, 3, num_cut)
        for s in range(2):
            turns = [[] for _ in range(segment.rows // tile)]
            pieces = [[] for _ in of_source]
            for key_tile, a, b, c, d, turn in np.asarray(walks[s]):
                source, n = of_source[key_tile]
                visited = [*range(a, b), *range(c, d)]
                for m in visited:
                    turns[m].append(n + int(tiles[s, source, m, 0]))
                if turn >= 0:
                    assert turn == len(pieces[key_tile])
                    pieces[key_tile].append(visited)
                assert turn >= 0 or not visited
            assert all(turn == list(range(len(turn))) for turn in turns)
            for (key_tile, a, b, c, d, _), cut in zip(whole[s], pieces, strict=True):
                assert len(cut) == 1 or all(cut)
                assert sorted(m for visited in cut for m in visited) == [*range(a, b), *range(c, d)], key_tile


@pytest.mark.parametrize("packed", [False, True])
def test_tables_of_known_positions_are_constants_that_equal_those_of_a_program(packed):
    layout, num_units = GistLayout(4, 130, 32), 300
    doc_start = np.asarray(kernel_cases.random_documents(np.random.default_rng(0), 2, num_units)) if packed else None
    segment = plan.segment_of(layout, 5 * num_units)
    sizes = (130,), (2, num_units), (2, 4 * num_units)
    kv = GistKV(*(np.zeros((*size, 2, 128), np.int8) for size in sizes for _ in (0, 1)))
    q = np.zeros((2, segment.rows, 2, 128), np.int8)

    def tables(starts):
        intervals = plan.row_intervals(layout, segment, 0, 0, starts)
        given = q, kv, layout, segment, intervals
        blocks = blocks_of.ForwardBlocks(), blocks_of.BackwardBlocks(walk=9)
        return intervals, forward.forward_tables(*given, blocks[0], not packed), backward.tables_of(*given, blocks[1])

    starts = unit_starts(layout, num_units, 0, doc_start)
    known, computed = tables(starts), jax.jit(tables)(jax.tree.map(jnp.asarray, starts))
    idle = (np.asarray(computed[2].walks)[..., 5] < 0).all(0)  # pieces without a turn: known ones have no line
    computed = (*computed[:2], computed[2]._replace(walks=np.asarray(computed[2].walks)[:, ~idle]))
    assert idle.any()
    for mine, theirs in zip(jax.tree.leaves(known), jax.tree.leaves(computed), strict=True):
        assert isinstance(mine, np.ndarray)
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(("runs", "total"), [(16, 517), (16, 16), (7, 100), (1, 5)])
def test_runs_take_every_key_tile_once_and_equally_many(runs, total):
    begins = [int(decode.run_begin(run, runs, total)) for run in range(runs + 1)]
    assert (begins[0], begins[-1]) == (0, total)
    assert np.diff(begins).max() - np.diff(begins).min() <= 1
    taken_by = np.repeat(np.arange(runs), np.diff(begins))
    np.testing.assert_array_equal(decode.run_of(np.arange(total, dtype=np.int32), runs, total), taken_by)


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="on a CPU, hopper_emulator.py cuts them")
@pytest.mark.parametrize("blocks", [{"heads": 2, "walk": 4}, {"walk": 6, "sinks_alone": True}])
@pytest.mark.parametrize(
    "name", ["head dim 64, 130 sinks", "documents that differ between sequences", "chunk of 64 units in a cache of 180"]
)
def test_gradients_of_walks_in_pieces_on_a_gpu(name, blocks):
    case = kernel_cases.ATTENTION[name]
    given = kernel_cases.inputs(case)
    attend = functools.partial(hopper.attend, blocks=(blocks_of.ForwardBlocks(), blocks_of.BackwardBlocks(**blocks)))
    run = kernel_cases.compiled(kernel_cases.direct(attend), case, given)
    found, again = run(given), run(given)
    assert all((found[part] == again[part]).all() for part in found), "two runs differ"
    kernel_cases.check(found, case)


# --- compilation for an H100 on a machine without one -----------------------------------------------------------------

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "NVIDIA H100 80GB HBM3"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

COMPILE = r"""
import re, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pallas_kernels import hopper
from pallas_kernels.gist_attention import GistKV
from pallas_kernels.hopper.blocks import BackwardBlocks, ForwardBlocks
from unigist_jax.layout import GistLayout, unit_starts
try:
    target = topologies.get_topology_desc(platform="cuda", target_config=sys.argv[1], topology="1x1x1")
except Exception as error:
    print("no compiler:", error)
    sys.exit(77)
place = SingleDeviceSharding(target.devices[0])
shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
layout, units, dim = GistLayout(4, 128, 128), 128, int(sys.argv[2])
def keys(raws):
    return GistKV(*(shaped(jnp.bfloat16, *n, 2, dim) for n in ((128,), (1, units), (1, raws)) for _ in (0, 1)))
q = shaped(jnp.bfloat16, 1, 5 * units, 8, dim)
blocks = ForwardBlocks(), BackwardBlocks(walk=2)
attend = lambda q, kv: hopper.attend(q, kv, layout, 0, 0, unit_starts(layout, units, jnp.int32(0)), blocks=blocks)
if sys.argv[3] == "forward":
    jax.jit(attend).lower(q, keys(4 * units)).compile()
elif sys.argv[3] == "backward":
    jax.jit(lambda q, kv, d: jax.vjp(attend, q, kv)[1](d)).lower(q, keys(4 * units), q).compile()
else:
    step = lambda q, kv, i: hopper.decode(q, kv, layout, i)
    compiled = jax.jit(step).lower(shaped(jnp.bfloat16, 1, 2, 8, dim), keys(136), shaped(jnp.int32, 1)).compile()
    moves = re.compile(r" (?:copy|pad|concatenate|transpose)\(")
    copies = [line for line in compiled.as_text().splitlines() if moves.search(line)]  # the kernel is one long line
    assert not copies, copies  # of the cache, the queries or the output
"""


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "backward", "decode"])
def test_compiles_for_an_h100(kernel, dim):
    pytest.importorskip("jax_cuda13_plugin", reason="needs jax's CUDA plugin and ptxas (nvidia-cuda-nvcc)")
    env = os.environ | {"JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_PTXAS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMPILE), TARGET, str(dim), kernel],
        env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout + done.stderr
    assert "serialized" not in said  # matrix products that wait for each other
    if (kernel, dim) != ("backward", 64):  # at the register limit: some tens of bytes
        assert "spilled" not in said
