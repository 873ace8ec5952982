"""The Hopper backend.

On any machine: what it refuses, its tables, and (where jax's CUDA plugin is installed) compilation for an H100 without
a GPU. On a Hopper GPU, the numbers against the float32 oracle (conftest.py would hide the GPU):

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest --noconftest tests/test_hopper.py -k gpu
"""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.gist_attention import GistKV
from unigist_jax.layout import GistLayout, document_starts, unit_starts

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
hopper = pytest.importorskip("pallas_kernels.hopper")
plan = pytest.importorskip("pallas_kernels.hopper.plan")
decode = pytest.importorskip("pallas_kernels.hopper.decode")

TOLERANCE = {"bfloat16": 5e-3, "float16": 1e-3}


def has_hopper() -> bool:
    try:
        return jax.devices("gpu")[0].compute_capability == "9.0"
    except RuntimeError:
        return False


on_gpu = pytest.mark.skipif(not has_hopper(), reason="needs a GPU of compute capability 9.0")


def random_inputs(rng, layout, num_units, num_gists, num_raws, batch, heads, kv_heads, dim, dtype):
    def array(*shape):
        return jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)

    q_shape = (batch, (layout.ratio + 1) * num_units, heads, dim)
    lengths = ((layout.num_sinks,), (batch, num_gists), (batch, num_raws))
    kv = GistKV(*(array(*length, kv_heads, dim) for length in lengths for _ in (0, 1)))
    return array(*q_shape), kv, array(*q_shape)


def random_documents(rng, batch, num_units):
    ids = np.cumsum(rng.random((batch, num_units)) < 0.03, axis=1)
    ids[:, 3:] += 1
    return document_starts(ids)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "dim", "ratio", "said"),
    [(jnp.float32, 128, 4, "float32"), (jnp.bfloat16, 96, 4, "96"), (jnp.bfloat16, 128, 3, "ratios")],
)
def test_refusals_name_the_value(dtype, dim, ratio, said):
    layout = GistLayout(ratio, 8, 0)
    q, kv, _ = random_inputs(np.random.default_rng(0), layout, 2, 2, 2 * ratio, 1, 2, 1, dim, dtype)
    assert said in hopper.refusal(q, kv, layout)
    assert said in hopper.decode_refusal(q, kv, layout)


def test_refuses_mixed_dtypes_and_too_many_heads_to_decode():
    layout = GistLayout(4, 8, 0)
    q, kv, _ = random_inputs(np.random.default_rng(0), layout, 2, 2, 8, 1, 33, 1, 64, jnp.bfloat16)
    assert hopper.refusal(q, kv, layout) is None
    assert "got 33" in hopper.decode_refusal(q, kv, layout)
    assert "float16" in hopper.refusal(q.astype(jnp.float16), kv, layout)


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "num_units", "batch", "packed"), [(4, 200, 2, True), (2, 127, 1, False), (8, 1, 1, False)]
)
def test_tables_cover_the_mask_and_nothing_unmasked_is_hidden(ratio, num_units, batch, packed):
    rng = np.random.default_rng(num_units)
    layout = GistLayout(ratio, 5, 8 * ratio)
    doc_start = random_documents(rng, batch, num_units) if packed else None
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


def test_splits_fill_the_multiprocessors():
    for batch in (1, 2, 3, 16, 64):
        pairs = batch * 8
        blocks = pairs * decode.choose_splits(pairs, 500)
        assert blocks / (-(-blocks // decode.BLOCKS) * decode.BLOCKS) > 0.9


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

COMPILE = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from pallas_kernels import hopper
from pallas_kernels.gist_attention import GistKV
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
attend = lambda q, kv: hopper.attend(q, kv, layout, 0, 0, unit_starts(layout, units, jnp.int32(0)))
if sys.argv[3] == "forward":
    jax.jit(attend).lower(q, keys(4 * units)).compile()
elif sys.argv[3] == "backward":
    jax.jit(lambda q, kv, d: jax.vjp(attend, q, kv)[1](d)).lower(q, keys(4 * units), q).compile()
else:
    step = lambda q, kv, i: hopper.decode(q, kv, layout, i)
    jax.jit(step).lower(shaped(jnp.bfloat16, 1, 2, 8, dim), keys(132), shaped(jnp.int32, 1)).compile()
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
    if kernel != "backward":  # its loop is at the register limit: the compiler spills some tens of scalars there
        assert "spilled" not in done.stdout + done.stderr


# --- numbers, on a GPU ------------------------------------------------------------------------------------------------

CASES = {
    "one unit": {"units": 1},
    "one unit, no sinks, no window": {"units": 1, "ratio": 2, "sinks": 0, "window": 0},
    "just below a tile": {"units": 127, "ratio": 2, "batch": 2},
    "just above a tile": {"units": 129, "ratio": 2, "window": 64, "heads": 6},
    "ratio 8": {"units": 256, "ratio": 8},
    "ratio 16, no window": {"units": 40, "ratio": 16, "window": 0},
    "ratio 32": {"units": 20, "ratio": 32},
    "odd sinks": {"units": 33, "sinks": 5},
    "dim 64": {"units": 140, "dim": 64, "sinks": 130},
    "a head each, dim 64, documents": {"units": 128, "dim": 64, "heads": 3, "kv_heads": 3, "packed": True},
    "float16, group of 16": {"units": 130, "dtype": jnp.float16, "heads": 16, "kv_heads": 1},
    "documents that differ between sequences": {"units": 200, "batch": 2, "packed": True},
    "documents, no sinks, no window": {"units": 300, "ratio": 2, "sinks": 0, "window": 0, "heads": 2, "packed": True},
    "chunk in the middle of a cache": {"units": 64, "first_unit": 70, "gists": 180},
    "chunk windows": {"units": 256, "chunk": 64},
    "many tiles": {"units": 1024, "heads": 4, "kv_heads": 1, "packed": True},
}


def relative(x, oracle) -> float:
    x, oracle = (np.asarray(jax.device_get(a), np.float64) for a in (x, oracle))
    return float(np.linalg.norm(x - oracle) / max(np.linalg.norm(oracle), 1e-30)) if oracle.size else 0.0


@on_gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gpu_forward_and_gradients_match_the_oracle(case):
    case = {"ratio": 4, "sinks": 128, "window": 128, "dim": 128, "heads": 8, "kv_heads": 2, "batch": 1} | case
    dtype, units, first = case.get("dtype", jnp.bfloat16), case["units"], case.get("first_unit", 0)
    layout = GistLayout(case["ratio"], case["sinks"], case["window"])
    rng = np.random.default_rng()
    first_raw = max(0, first - layout.window_units)
    sizes = case["batch"], case["heads"], case["kv_heads"], case["dim"], dtype
    gists, raws = case.get("gists", units), (first + units - first_raw) * layout.ratio
    q, kv, cotangent = random_inputs(rng, layout, units, gists, raws, *sizes)
    doc_start = random_documents(rng, case["batch"], units) if case.get("packed") else None
    raw_start = None
    if "chunk" in case:
        raw_start = np.broadcast_to(np.arange(units, dtype=np.int32) // case["chunk"] * case["chunk"], (1, units))

    def values(attend):
        def of(q, kv, cotangent, first, first_raw):
            starts = unit_starts(layout, units, first, doc_start, raw_start)
            out, vjp = jax.vjp(lambda q, kv: attend(q, kv, layout, first, first_raw, starts), q, kv)
            return out, *vjp(cotangent)

        return jax.jit(of)

    args = (q, kv, cotangent, jnp.int32(first), jnp.int32(first_raw))
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == dtype else x, args)
    expected = values(reference.attend)(*jax.device_put(wide, jax.devices("cpu")[0]))
    poison = [jnp.full((2**24,), jnp.nan, jnp.float32) for _ in range(8)]
    jax.block_until_ready(poison)
    del poison  # the allocator hands this memory to the outputs: an unwritten row shows as NaN
    attend = values(hopper.attend)
    found, again = attend(*args), attend(*args)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative(x.astype(jnp.float32), y) < TOLERANCE[jnp.dtype(dtype).name]
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        assert (x == y).all(), "two runs differ"


@on_gpu
def test_gpu_chunks_equal_one_pass():
    layout, units, cut = GistLayout(4, 16, 64), 150, 70
    q, kv, _ = random_inputs(np.random.default_rng(), layout, units, units, 4 * units, 1, 8, 2, 128, jnp.bfloat16)

    def run(q, first, count):
        starts = unit_starts(layout, count, jnp.int32(first))
        return hopper.attend(q, kv, layout, first, 0, starts)

    whole = run(q, 0, units)
    raws, gists = q[:, : 4 * units], q[:, 4 * units :]
    for first, last in ((0, cut), (cut, units)):
        part = jnp.concatenate([raws[:, 4 * first : 4 * last], gists[:, first:last]], axis=1)
        expected = jnp.concatenate(
            [whole[:, 4 * first : 4 * last], whole[:, 4 * units + first : 4 * units + last]], axis=1
        )
        assert relative(run(part, first, last - first).astype(jnp.float32), expected.astype(jnp.float32)) < 5e-3


@on_gpu
@pytest.mark.parametrize(
    ("sizes", "layout", "gists", "raw_index"),
    [
        ((4, 32, 8, 128, jnp.bfloat16), GistLayout(4, 128, 128), 300, [0, 5, 777, 1199]),
        ((2, 4, 4, 64, jnp.bfloat16), GistLayout(8, 0, 0), 70, [3, 559]),
        ((3, 32, 1, 128, jnp.bfloat16), GistLayout(4, 5, 64), 1000, [1000, 1001, 3999]),
        ((1, 6, 2, 128, jnp.float16), GistLayout(4, 128, 128), 129, [515]),
    ],
    ids=["ragged", "no sinks", "group of 32", "float16"],
)
def test_gpu_decode_matches_the_oracle(sizes, layout, gists, raw_index):
    batch, heads, kv_heads, dim, dtype = sizes
    rng = np.random.default_rng()
    ring = layout.window + layout.ratio
    _, kv, _ = random_inputs(rng, layout, 1, gists, ring, batch, heads, kv_heads, dim, dtype)
    q = jnp.asarray(rng.standard_normal((batch, 2, heads, dim), dtype=np.float32), dtype)
    raw_index = jnp.asarray(raw_index, jnp.int32)
    out = jax.jit(lambda q, kv, i: hopper.decode(q, kv, layout, i))(q, kv, raw_index)
    wide = jax.device_put(jax.tree.map(lambda x: x.astype(jnp.float32), (q, kv)), jax.devices("cpu")[0])
    oracle = reference.decode(*wide, layout, jax.device_put(raw_index, jax.devices("cpu")[0]))
    assert relative(out.astype(jnp.float32), oracle) < TOLERANCE[jnp.dtype(dtype).name]
