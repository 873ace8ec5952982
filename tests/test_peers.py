"""FlexAttention, a peer of the benchmarks: its mask against the oracle, run uncompiled on the CPU."""

import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest

from launch import peers
from pallas_kernels import gist_attention

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")


@pytest.mark.filterwarnings("ignore")  # torch warns that it runs uncompiled
@pytest.mark.parametrize(("units", "ratio", "sinks", "window"), [(9, 4, 5, 8), (5, 2, 0, 0), (3, 8, 1, 16)], ids=str)
def test_flex_attention_with_the_gist_mask_is_the_oracle(units, ratio, sinks, window):
    case = kernel_cases.small(units, ratio=ratio, sinks=sinks, window=window, dim=16, heads=4, kv_heads=2)
    q, kv = kernel_cases.inputs(case._replace(dtype="float32"))[:2]
    expected = gist_attention(q, kv, case.layout, backend="reference")

    def heads_first(*parts):
        return torch.from_numpy(np.array(jnp.concatenate(parts, axis=1).swapaxes(1, 2)))

    keys = heads_first(kv.sink_k[None], kv.gist_k, kv.raw_k)
    values = heads_first(kv.sink_v[None], kv.gist_v, kv.raw_v)
    mask_mod = peers.gist_mask(case.layout, units)
    mask = flex.create_block_mask(mask_mod, None, None, q.shape[1], keys.shape[2], device="cpu")
    out = flex.flex_attention(heads_first(q), keys, values, block_mask=mask, enable_gqa=True)
    np.testing.assert_allclose(out.swapaxes(1, 2).numpy(), expected, rtol=1e-5, atol=2e-6)


def test_it_needs_a_cuda_device():
    if torch.cuda.is_available():
        pytest.skip("here is one")
    case = kernel_cases.small(3)
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        peers.flex(case.layout, 3, peers.Heads(2, 1, 64))
