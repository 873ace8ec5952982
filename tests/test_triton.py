"""The Triton backend without a GPU: its table of reach, and that Triton's own compiler takes every kernel for GPUs that
are not here, within their shared memory. Its numbers are held to the oracle by test_kernels.py.
"""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from pallas_kernels import reference
from unigist_jax.layout import unit_starts

pytest.importorskip("triton")
plan = pytest.importorskip("pallas_kernels.triton.plan")

SHARED = {86: 99, 90: 227}  # KiB that one block may take


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["documents of odd lengths, two sequences", "chunk windows and documents", "one unit"])
def test_reach_covers_the_mask_and_calls_full_only_what_is(name):
    case = kernel_cases.ATTENTION[name]
    given = kernel_cases.inputs(case)
    starts = unit_starts(case.layout, case.units, 0, given.doc_start, given.raw_start)
    raws = case.units * case.ratio
    mask = reference.visibility_mask(case.layout, case.units, 0, case.units, raws, 0, 0, starts)
    rows = np.asarray(mask)[:, raws:]  # a gist sees no less than its unit's raws
    keys = 4
    for at, lo in (
        (slice(0, case.units), starts.gist_start),
        (slice(case.units, None), starts.raw_start * case.ratio),
    ):
        visible = rows[..., at]
        table = np.asarray(plan.reach(jnp.atleast_2d(lo), visible.shape[2], keys))
        for s, tile in np.ndindex(*table.shape[:2]):
            seen, full = table[s, tile]
            first, last = tile * keys, min((tile + 1) * keys, visible.shape[2]) - 1
            assert not visible[s, seen:, first : last + 1].any()
            diagonal = np.flatnonzero(visible[s, :, last])
            if diagonal.size:
                assert visible[s, diagonal[0] : full, first : last + 1].all()


def test_splits_fill_a_gpu_but_leave_work_in_each():
    assert plan.splits(programs=4096, most=8) == 1
    assert plan.splits(programs=256, most=8) * 256 >= plan.PROGRAMS
    assert plan.splits(programs=8, most=3) == 3
    assert plan.splits(programs=8, most=0) == 1


# --- compilation without a GPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [86, 90])
def test_compiles_within_shared_memory(capability, tmp_path):
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "triton_compile.py")
    done = subprocess.run(
        [sys.executable, script, str(capability), "128"],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 5
    for kernel in kernels:
        assert kernel["shared_bytes"] <= SHARED[capability] * 1024, kernel
        # the rows of a decoding step are too few for Hopper's matrix unit
        assert kernel["wgmma"] == (capability == 90 and kernel["kernel"] != "decode"), kernel


def test_lowers_through_jax_triton():
    """The calls with all their arguments, as far as XLA takes them: needs jaxlib's part for GPUs, but none of them."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "triton_lower.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode == 77:
        pytest.skip("jax_triton does not import where jax has no CUDA plugin")
    assert done.returncode == 0, done.stderr[-2000:]
    # forward, dQ, and the keys of each source; the step, and the merge of its parts
    assert json.loads(done.stdout) == {"forward and backward": 5, "decode": 2}
