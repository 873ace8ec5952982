"""Context parallelism: rows spread over virtual devices against the same rows on one device."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from unigist_jax.context import Placement
from unigist_jax.layout import GistLayout, document_starts
from unigist_jax.model import LlamaConfig, init_llama
from unigist_jax.sharding import abstract_on, batch_sharding, make_mesh, partition_spec, tree_shardings
from unigist_jax.training.loss import head_of, summed_cross_entropy, summed_loss

CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    dtype="float32",
)  # fmt: skip


def rows(layout, units, batch=2):
    """Tokens, documents of odd lengths that cross the pieces, and a mask."""
    rng = np.random.default_rng(units)
    tokens = rng.integers(0, CONFIG.vocab_size, (batch, units * layout.ratio))
    ids = np.stack([np.repeat(np.arange(units), rng.choice([1, 3, 5, 9], units))[:units] for _ in range(batch)])
    return (
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(document_starts(ids)),
        jnp.asarray(rng.random(tokens.shape) < 0.9),
    )


def loss_and_gradients(layout, arrays, mesh, chunk=5):
    def loss(model, *arrays):
        total, count = summed_loss(model, *arrays, chunk=chunk)
        return total / count

    model = init_llama(CONFIG, layout, 0)
    with jax.set_mesh(mesh):
        model = jax.device_put(model, tree_shardings(mesh, model))
        arrays = jax.device_put(arrays, batch_sharding(mesh))
        return jax.device_get(jax.jit(jax.value_and_grad(loss))(model, *arrays))


@pytest.mark.parametrize(
    ("layout", "units", "sizes"),
    [
        (GistLayout(2, 3, 6), 24, {"context": 4}),  # a piece is exactly the window
        (GistLayout(4, 2, 8), 40, {"context": 2, "tensor": 2}),
        (GistLayout(2, 1, 0), 8, {"context": 4, "fsdp": 2}),  # pieces of one unit, nothing passed on
        (GistLayout(2, 1, 4), 48, {"context": 8}),
    ],
    ids=["4 devices", "2 by tensor", "no window", "8 devices"],
)
def test_spread_rows_have_the_loss_and_gradients_of_one_device(layout, units, sizes):
    arrays = rows(layout, units)
    devices = int(np.prod(list(sizes.values())))
    spread = loss_and_gradients(layout, arrays, make_mesh(data=1, **sizes, devices=jax.devices()[:devices]))
    alone = loss_and_gradients(layout, arrays, make_mesh(data=1, devices=jax.devices()[:1]))
    np.testing.assert_allclose(spread[0], alone[0], rtol=1e-6)
    for got, want in zip(jax.tree.leaves(spread[1]), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * max(1e-3, np.abs(want).max(initial=0)))


@pytest.mark.parametrize("sizes", [{"context": 4}, {"data": 2, "context": 2}], ids=str)
def test_a_layer_moves_gists_and_the_window_alone(sizes):
    """The largest array that any collective of the forward pass moves has one entry a gist, not one a raw."""
    layout, units = GistLayout(8, 2, 8), 64
    mesh = make_mesh(**({"data": 1} | sizes), devices=jax.devices()[:4])
    tokens, doc_start, mask = jax.device_put(rows(layout, units, batch=mesh.shape["data"]), batch_sharding(mesh))
    with jax.set_mesh(mesh):
        model = init_llama(CONFIG, layout, 0)
        model = jax.device_put(model, tree_shardings(mesh, model))
        run = jax.jit(lambda *x: summed_loss(*x, chunk=64)).lower(model, tokens, doc_start, mask).compile()
    sizes = {"all-gather": [], "collective-permute": [], "all-to-all": []}
    for line in run.as_text().splitlines():
        found = re.search(r"= f32\[([\d,]*)\]\S* (all-gather|collective-permute|all-to-all)(?:-start)?\(", line)
        if found:
            sizes[found.group(2)].append(int(np.prod([int(x) for x in found.group(1).split(",")])))
    per_unit = CONFIG.num_kv_heads * CONFIG.head_dim
    assert set(sizes["all-gather"]) == {units * per_unit}  # every gist's keys, or values
    assert set(sizes["collective-permute"]) == {layout.window * per_unit}
    assert not sizes["all-to-all"]


def test_pieces_balance_the_gists_that_devices_see():
    for devices in (2, 3, 8):
        order = Placement(devices).order.reshape(devices, 2)
        assert len(set(order.sum(axis=1))) == 1
        assert sorted(order.reshape(-1)) == list(range(2 * devices))


def test_placing_and_restoring():
    x = jnp.arange(24)[None]
    placed = Placement(3).place(x)
    assert placed[0].reshape(6, 4)[:, 0].tolist() == [0, 20, 4, 16, 8, 12]
    assert (Placement(3).restore(placed) == x).all()
    assert Placement(1).place(x) is x


@pytest.mark.parametrize(
    ("num_raws", "said"),
    [(40, r"has 20 units, which do not cut into 8 pieces for context=4; use a multiple of 16 raws"),
     (16, r"pieces of 1 units, fewer than the window's 2; use longer rows or fewer devices")],
)  # fmt: skip
def test_rows_that_do_not_cut_are_refused(num_raws, said):
    with pytest.raises(ValueError, match=said):
        Placement(4).piece_units(GistLayout(2, 0, 4), num_raws)


@pytest.mark.parametrize("sizes", [{"context": 2}, {"data": 2, "context": 2}], ids=str)
def test_no_chunk_of_the_loss_waits_for_gradients_of_other_devices(sizes):
    """Where devices hold the head whole, its gradient is summed over them after the last chunk, not in every one."""
    mesh = make_mesh(**({"data": 1} | sizes), devices=jax.devices()[: math.prod(sizes.values())])
    shapes = ((4, 32, CONFIG.hidden_size), jnp.float32), ((4, 32), jnp.int32), ((4, 32), jnp.bool_)
    rows = NamedSharding(mesh, partition_spec("batch", "positions"))
    arrays = [jax.ShapeDtypeStruct(*shape, sharding=rows) for shape in shapes]
    head = abstract_on(mesh, jax.eval_shape(lambda: head_of(init_llama(CONFIG, GistLayout(4, 0, 0), 0))))
    loss = partial(summed_cross_entropy, chunk=4, shards=2)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(head, *arrays).compile().as_text()
    in_loops = re.findall(r"body=%([\w.\-]+)", compiled)
    collective = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
    bodies = dict(re.findall(r"^%([\w.\-]+) \(.*?\{\n(.*?)^\}", compiled, re.MULTILINE | re.DOTALL))
    assert in_loops
    assert not any(collective.search(bodies[name]) for name in in_loops)
    assert collective.search(compiled)
