"""Forward pass of gist attention on TPU: one fused Mosaic kernel.

Axis legend
  B  batch               J  jobs: groups of query heads that share a KV head          D  head dim
  M  query tiles of C columns (positions times heads), N  key tiles of K keys (plan.py)

Key tiles that a query tile visits (█ unmasked, ▒ masked), for one document with r = 4, s = 128 and w = 128:

                    sinks and gists            raws
  raws   tile 17    █ █ █ █ █ ▒                ▒ ▒          the window and itself
  gists  tile 4     █ █ █ █ █ ▒                ▒ ▒ ▒        its own units' raws and the window

Packed documents move the left border of the gists: after the tile of the sinks, tiles before the document are not read.

The grid is (batch, job, query tile). How many key tiles a query tile visits is a number in `key_table`, prefetched into
scalar memory; a loop inside the grid step walks over exactly those, unmasked ones first, with its own double buffering
(stream.py). A grid axis over key tiles would need a static bound, and nearly half of its steps would be empty: in
causal order the average query tile visits half as many tiles as the last one.

A masked score is a large negative number, not -inf: a column that has seen no key yet sums nonsense that its first key
wipes out, and no guard is needed. `lse` is the base-2 logarithm of the softmax's sum.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.tpu.cost import forward_cost
from pallas_kernels.tpu.plan import KeyAxis, Segment
from pallas_kernels.tpu.query_tiles import over_query_tiles
from pallas_kernels.tpu.tiles import TN, dot, scores_of


def gist_attention_forward(
    q: Float[Array, "B J M C D"],
    k: Float[Array, "B Hkv N K D"],
    v: Float[Array, "B Hkv N K D"],
    intervals: Int32[Array, "S M 4 C"],
    table: Int32[Array, "S M L"],
    segment: Segment,
    axis: KeyAxis,
    layout,
) -> tuple[Float[Array, "B J M C D"], Float[Array, "B J M 1 C"]]:
    """Output in q's dtype and base-2 log-sum-exp in float32, tiled as q is."""
    batch, jobs, num_tiles, columns, dim = q.shape

    def tile_kernel(walk, q_ref, rows_ref, out_ref, lse_ref, k_buf, v_buf, acc, top, total):
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)

        def step(buffer, mask):
            of_parts = [mask(scores_of(k_buf[buffer], q_ref[x]), rows_ref.at[:, x]) for x in segment.parts]
            for part, scores in zip(segment.parts, of_parts, strict=True):
                new_top = jnp.maximum(top[:, part], scores.max(axis=0, keepdims=True))
                shrink = jnp.exp2(top[:, part] - new_top)
                weights = jnp.exp2(scores - new_top)
                total[:, part] = total[:, part] * shrink + weights.sum(axis=0, keepdims=True)
                acc[:, part] = acc[:, part] * shrink + dot(v_buf[buffer], weights.astype(v_buf.dtype), TN)
                top[:, part] = new_top

        walk(step)
        out_ref[...] = (acc[...] / total[...]).T.astype(out_ref.dtype)
        lse_ref[...] = top[...] + jnp.log2(total[...])

    row = pltpu.VMEM((1, columns), jnp.float32)
    return over_query_tiles(
        tile_kernel,
        (q,),
        k,
        v,
        intervals,
        table,
        outputs=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, jobs, num_tiles, 1, columns), jnp.float32),
        ],
        scratch=[pltpu.VMEM((dim, columns), jnp.float32), row, row],
        axis=axis,
        cost=forward_cost(layout, segment, axis, q, k),
        name="gist_attention_forward",
    )
