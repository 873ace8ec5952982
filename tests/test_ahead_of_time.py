"""Compiling without running: what --compile_only tells."""

import re

import jax
import pytest
from tiny_runs import tiny_config

from pallas_kernels.backends import compiling_for
from unigist_jax.config import RunConfig
from unigist_jax.sharding import make_mesh
from unigist_jax.training.ahead_of_time import abstract_batch, compile_step, describe, find_target, this_machine
from unigist_jax.training.step import abstract_state, make_train_step

ONE = {"data": 1, "fsdp": 1, "tensor": 1}
pytestmark = pytest.mark.usefixtures("compiled_once")


def small_run(**sections):
    config = tiny_config()
    config.model.update(vocab_size=48, num_layers=1, attention_backend="reference")
    for section, fields in sections.items():
        config[section].update(fields)
    return RunConfig.from_dict(config.to_dict())


def test_memory_of_a_device_falls_with_the_devices_that_share_the_state():
    """Eight bytes of moments and four of parameters for each parameter, split where the mesh splits."""
    run = small_run(mesh={"data": 1, "fsdp": 8, "tensor": 1})
    split = compile_step(run, this_machine())
    whole = compile_step(small_run(mesh={"data": 8, "fsdp": 1, "tensor": 1}), this_machine())
    layer = 16 * (2 * 4 + 2 * 2) * 8 + 3 * 16 * 24
    split_up = 12 * (layer + 2 * 48 * 16 + 16 + 2 * 16)  # layers, embedding and head, gist, sinks
    saved = whole["bytes"]["arguments"] - split["bytes"]["arguments"]
    assert saved == pytest.approx(split_up * 7 / 8, rel=0.01)
    assert split["mesh"] == {"fsdp": 8} and split["tokens_per_step"] == 8 * 32
    assert "of 0.0 GiB" in describe(split) and "fits" in describe(split) and "256 raws" in describe(split)
    assert "DOES NOT FIT by 1.0 GiB" in describe(
        split | {"bytes": split["bytes"] | {"total": 2**31}, "device_bytes": 2**30}
    )


@pytest.mark.parametrize(
    ("name", "said"), [("v9:2x2", "neither a TPU slice .*v5p.* nor GPUs"), ("h100", "neither"), ("v5p:8", "neither")]
)
def test_unknown_devices_are_refused(name, said):
    with pytest.raises(ValueError, match=f"--topology={name} is {said}"):
        find_target(name)


def test_a_run_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"model.vocab_size=0 is taken from the tokenizer"):
        compile_step(small_run(model={"vocab_size": 0}), this_machine())


def test_attention_that_is_kept_is_computed_once():
    """The kernels in a GPU's program: attention of the scanned layer forward, and backward. XLA would add a third."""
    try:
        target = find_target("h100:1")
    except ValueError as error:
        pytest.skip(str(error).split(";")[0])
    model = {"num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 128, "dtype": "bfloat16"}
    gist = {"num_sinks": 16, "window": 128}
    run = small_run(
        model=model | {"attention_backend": None, "remat": "attention"}, gist=gist, data={"row_length": 1024}, mesh=ONE
    )
    mesh = make_mesh(data=1, devices=target.devices)
    with compiling_for(target.devices[0]), jax.set_mesh(mesh):
        arguments = abstract_state(run, mesh), abstract_batch(run, mesh, packed=False)
        program = make_train_step(run, mesh).lower(*arguments).compile().as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu', program)) == 2
