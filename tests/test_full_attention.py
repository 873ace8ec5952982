"""Full attention against the dense oracle, with and without packed documents; on a GPU, where cuDNN computes it:

python -m pytest --noconftest tests/test_full_attention.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.reference import masked_attention
from unigist_jax.model.attention import cudnn_takes, full_attention

ON_GPU = jax.devices()[0].platform == "gpu"
LENGTH, DTYPE, TOLERANCE = (512, jnp.bfloat16, 1e-2) if ON_GPU else (96, jnp.float32, 2e-6)


def values_and_gradients(attend, q, k, v, cotangent):
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent)


@pytest.mark.parametrize("documents", [None, [0], [0, LENGTH // 3, LENGTH // 2]], ids=["unsaid", "one", "three"])
def test_full_attention_is_the_oracles(documents):
    heads = (4, 2, 2, 4)
    q, k, v, d = (jax.random.normal(jax.random.key(i), (2, LENGTH, h, 64), DTYPE) for i, h in enumerate(heads))
    assert cudnn_takes(q, k) == ON_GPU
    place = np.arange(LENGTH)
    starts = np.array(documents or [0])
    begin = np.stack([starts[np.searchsorted(starts, place, side="right") - 1], np.zeros(LENGTH, int)])
    mask = (place[None, None] >= begin[..., None]) & (place[None, None] <= place[None, :, None])
    given = None if documents is None else jnp.asarray(begin, jnp.int32)
    got = jax.jit(lambda *x: values_and_gradients(lambda q, k, v: full_attention(q, k, v, given), *x))(q, k, v, d)
    expected = values_and_gradients(lambda q, k, v: masked_attention(q, k, v, jnp.asarray(mask)), q, k, v, d)
    got, expected = jax.tree.map(lambda x: np.asarray(x, np.float32), (got, expected))
    for mine, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())
