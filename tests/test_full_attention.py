"""Full attention against the dense oracle, with and without packed documents; on a GPU, where cuDNN computes it:

python -m pytest --noconftest tests/test_full_attention.py
"""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import hopper_emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import documents
from pallas_kernels.backends import compiling_for
from pallas_kernels.reference import masked_attention
from unigist_jax.model.attention import cudnn_takes, full_attention

ON_GPU = jax.devices()[0].platform == "gpu"
LENGTH, DTYPE, TOLERANCE = (512, jnp.bfloat16, 1e-2) if ON_GPU else (96, jnp.float32, 2e-6)


def values_and_gradients(attend, q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent)


def assert_is_the_oracle(attend, starts):
    """Holds attention, values and gradients, to the oracle; the documents of the first row begin at `starts`."""
    heads = (4, 2, 2, 4)
    q, k, v, d = (jax.random.normal(jax.random.key(i), (2, LENGTH, h, 64), DTYPE) for i, h in enumerate(heads))
    assert cudnn_takes(q, k) == ON_GPU
    place, starts = np.arange(LENGTH), np.array(starts)
    begin = np.stack([starts[np.searchsorted(starts, place, side="right") - 1], np.zeros(LENGTH, int)])
    mask = (place[None, None] >= begin[..., None]) & (place[None, None] <= place[None, :, None])
    begin = jnp.asarray(begin, jnp.int32)
    got = jax.jit(lambda *x: values_and_gradients(lambda q, k, v: attend(q, k, v, begin), *x))(q, k, v, d)
    expected = values_and_gradients(lambda q, k, v: masked_attention(q, k, v, jnp.asarray(mask)), q, k, v, d)
    got, expected = jax.tree.map(lambda x: np.asarray(x, np.float32), (got, expected))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.parametrize("packed", [None, [0], [0, LENGTH // 3, LENGTH // 2]], ids=["unsaid", "one", "three"])
def test_full_attention_is_the_oracles(packed):
    assert_is_the_oracle(lambda q, k, v, begin: full_attention(q, k, v, begin if packed else None), packed or [0])


def by_units(backend):
    """Documents that begin at multiples of 4, as the kernels of gist attention take them."""
    return lambda q, k, v, begin: documents.causal_documents(q, k, v, begin[:, ::4] // 4, backend)


AT_UNITS = [0, LENGTH // 3 // 4 * 4, LENGTH // 2]


def test_documents_at_units_by_the_kernels_of_gist_attention():
    assert_is_the_oracle(by_units(None if ON_GPU else "blocked"), AT_UNITS)


@pytest.mark.skipif(ON_GPU, reason="the kernels themselves ran above")
def test_documents_at_units_by_the_hopper_kernels_emulated():
    """In a process of its own, for the types that tests check are not the emulator's."""
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_which_documents_go_to_the_kernels():
    q, k = (jnp.zeros((2, 96, heads, 64), jnp.bfloat16) for heads in (4, 2))
    assert documents.kernel(q, k, 4) is None or ON_GPU
    hopper = SimpleNamespace(platform="gpu", device_kind="an H100", compute_capability="9.0")
    with compiling_for(hopper):
        assert documents.kernel(q, k, 1) is None  # documents that begin anywhere
        assert (documents.kernel(q, k, 4) == "hopper") == (jax.__version_info__ >= (0, 11))


if __name__ == "__main__":
    with (
        hopper_emulator.emulation() as hopper,
        mock.patch.object(documents, "choose", lambda *_: ("hopper", hopper.op)),
    ):
        assert_is_the_oracle(by_units("hopper"), AT_UNITS)
