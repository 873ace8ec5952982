"""The published Llamas, abstractly: their config.json read, every tensor's name and shape, their parameters counted."""

import functools
import math

import jax
import pytest
from flax import nnx

from unigist_jax.layout import GistLayout
from unigist_jax.model import Llama
from unigist_jax.model.hf_config import config_from_hf, config_to_hf
from unigist_jax.model.hf_weights import GIST_PARAMETERS, HF_WEIGHTS, names_and_shape
from unigist_jax.model.shapes import SHAPES
from unigist_jax.sharding import make_mesh, parameter_path, tree_shardings


def published(hidden, intermediate, layers, heads, kv_heads, *, vocab, context, theta, dtype, **entries):
    """A config.json as it was published (entries that say nothing about the weights left out)."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": context,
        "rope_theta": theta, "rms_norm_eps": 1e-05, "torch_dtype": dtype, "pretraining_tp": 1,
        "rope_scaling": None, "tie_word_embeddings": False, "use_cache": True, "initializer_range": 0.02, **entries,
    }  # fmt: skip


def llama2(*sizes):
    published_v4_31 = published(*sizes, vocab=32_000, context=4096, theta=None, dtype="float16", bos_token_id=1)
    return {name: value for name, value in published_v4_31.items() if name != "rope_theta"}  # not yet an entry


def llama3(*sizes, stretch=None, context=131_072, **entries):
    scaling = {
        "factor": stretch, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    }  # fmt: skip
    return published(
        *sizes, 8, vocab=128_256, context=context, theta=500_000.0, dtype="bfloat16", attention_bias=False,
        attention_dropout=0.0, mlp_bias=False, bos_token_id=128_000, eos_token_id=[128_001, 128_008, 128_009],
        rope_scaling=stretch and scaling, **entries,
    )  # fmt: skip


PUBLISHED = {  # config.json, and the number of parameters on the model's card
    "llama2-7b": (llama2(4096, 11_008, 32, 32, 32), 6_738_415_616),
    "llama2-13b": (llama2(5120, 13_824, 40, 40, 40), 13_015_864_320),
    "llama2-70b": (llama2(8192, 28_672, 80, 64, 8), 68_976_648_192),
    "llama3-8b": (llama3(4096, 14_336, 32, 32, context=8192), 8_030_261_248),
    "llama3-70b": (llama3(8192, 28_672, 80, 64, context=8192), 70_553_706_496),
    "llama3.1-8b": (llama3(4096, 14_336, 32, 32, stretch=8.0), 8_030_261_248),
    "llama3.1-70b": (llama3(8192, 28_672, 80, 64, stretch=8.0), 70_553_706_496),
    "llama3.2-1b": (llama3(2048, 8192, 16, 32, stretch=32.0, tie_word_embeddings=True, head_dim=64), 1_235_814_400),
    "llama3.2-3b": (llama3(3072, 8192, 28, 24, stretch=32.0, tie_word_embeddings=True, head_dim=128), 3_212_749_824),
}


@functools.cache
def abstract(name):
    """Every parameter's path, shape and dtype, without its weights."""
    model = jax.eval_shape(lambda: Llama(SHAPES[name], GistLayout(), rngs=nnx.Rngs(params=0)))
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model)}


def test_every_shape_is_checked():
    assert PUBLISHED.keys() == SHAPES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_and_parameters(name):
    hf, count = PUBLISHED[name]
    assert config_from_hf(hf) == SHAPES[name]
    assert config_from_hf(config_to_hf(SHAPES[name])) == SHAPES[name]
    ours = {path: math.prod(leaf.shape) for path, leaf in abstract(name).items() if path not in GIST_PARAMETERS}
    assert sum(ours.values()) == count
    assert {str(leaf.dtype) for leaf in abstract(name).values()} == {hf["torch_dtype"]}


@pytest.mark.parametrize("name", ["llama2-70b", "llama3.1-8b", "llama3.2-1b", "llama3.2-3b"])
def test_tensors_are_those_of_transformers(name):
    """Names and shapes of the state dict that transformers makes of the same config.json, on torch's meta device."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    hf, _ = PUBLISHED[name]
    layers = 2  # all are alike, and the meta device takes a while to lay out 80
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf | {"num_hidden_layers": layers}))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if hf["tie_word_embeddings"]:
        theirs.pop("lm_head.weight", None)
    ours = {}
    for path, leaf in abstract(name).items():
        if path not in GIST_PARAMETERS:
            names, shape = names_and_shape(path, (layers, *leaf.shape[1:]) if "layers/" in path else leaf.shape)
            ours |= dict.fromkeys(names, HF_WEIGHTS[path].hf_shape(shape))
    assert ours == theirs


def test_the_largest_shards_over_eight_devices():
    """70B in bf16 lies evenly on 8 devices, by tensor parallelism and by fsdp: about 17.6 GB each."""
    model = jax.eval_shape(lambda: Llama(SHAPES["llama3.1-70b"], GistLayout(), rngs=nnx.Rngs(params=0)))
    for sizes in ({"tensor": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}):
        shardings = tree_shardings(make_mesh(data=1, **sizes), model)
        pieces = jax.tree.map(lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)), model, shardings)
        assert sum(jax.tree.leaves(pieces)) < 1.001 * 70_553_706_496 / 8, sizes
