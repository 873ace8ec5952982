"""Weights in and out of Hugging Face directories, and HF's own Llama as the oracle of the model and of its mask."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import CONFIG, LAYOUT, SCALING, tiny_model
from safetensors.numpy import load_file, save_file

from unigist_jax.inference import for_inference
from unigist_jax.layout import GistLayout
from unigist_jax.model.hf import load_hf, save_hf
from unigist_jax.model.hf_config import config_from_hf, config_to_hf, layout_from_hf
from unigist_jax.model.hf_weights import HfWeight
from unigist_jax.sharding import make_mesh, tree_shardings

V4 = config_to_hf(CONFIG)


def assert_same_bits(got, expected):
    """Two models of the same parameters, to the bit."""
    got, expected = (jax.tree_util.tree_leaves_with_path(model) for model in (got, expected))
    assert [path for path, _ in got] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture
def saved(tmp_path):
    """A directory that `save_hf` wrote, and its model."""
    model = tiny_model()
    save_hf(model, tmp_path)
    return tmp_path, model


def edit_config(directory, **changes):
    """Rewrites entries of a config.json; None removes one."""
    hf = {**json.loads((directory / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))


def edit_tensors(directory, **changes):
    """Rewrites tensors of a model.safetensors; None removes one."""
    tensors = load_file(directory / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, directory / "model.safetensors")


# --- config.json ----------------------------------------------------------------------------------------------------


def test_both_dialects_are_read():
    old = {k: v for k, v in V4.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype", "dtype")}
    v4 = old | {"rope_theta": 10_000, "rope_scaling": SCALING, "torch_dtype": "bfloat16"}
    v5 = old | {"rope_parameters": {"rope_theta": 10_000.0, **SCALING}, "dtype": "bfloat16"}
    early = v4 | {"rope_scaling": {"type": "llama3", **{k: v for k, v in SCALING.items() if k != "rope_type"}}}
    expected = dataclasses.replace(CONFIG, param_dtype="bfloat16", dtype="bfloat16")
    assert config_from_hf(v4) == config_from_hf(v5) == config_from_hf(early) == expected
    assert config_from_hf(v5, param_dtype="float32", attention="full") == dataclasses.replace(
        expected, param_dtype="float32", attention="full"
    )


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 10_000.0, "rope_type": "default"}, "rope_theta": None},
    ],
)
def test_no_rotary_scaling(rope):
    assert config_from_hf({**V4, "rope_scaling": None, **rope}) == dataclasses.replace(CONFIG, rope_scaling=None)


def test_defaults_of_absent_entries():
    sizes = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = config_from_hf({name: V4[name] for name in sizes})
    assert (config.num_kv_heads, config.head_dim) == (4, 8)
    assert (config.rope_theta, config.rope_scaling, config.rms_norm_eps) == (10_000.0, None, 1e-6)
    assert (config.tie_embeddings, config.param_dtype, config.dtype) == (False, "float32", "float32")


@pytest.mark.parametrize("scaling", [None, CONFIG.rope_scaling])
@pytest.mark.parametrize(
    ("layout", "attention"),
    [(None, "gist"), (LAYOUT, "gist"), (LAYOUT, "full"), (GistLayout(4, 8, 28, chunk=32), "autocompressors")],
)
def test_config_round_trip(scaling, layout, attention):
    config = dataclasses.replace(CONFIG, rope_scaling=scaling, tie_embeddings=True, attention=attention)
    hf = json.loads(json.dumps(config_to_hf(config, layout)))
    assert config_from_hf(hf) == config
    assert layout_from_hf(hf) == layout
    assert (hf["rope_theta"], hf["torch_dtype"], "rope_parameters" in hf) == (10_000.0, "float32", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type='mistral'.*only Llama"),
        ({"model_type": None}, "model_type=None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification.*LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias=True.*no bias"),
        ({"mlp_bias": True}, "mlp_bias=True.*no bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*silu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*bfloat16"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'.*'llama3' and 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope type 'linear'"),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope entry has no 'low_freq_factor'"),
        ({"hidden_size": None}, "no 'hidden_size'"),
        ({"hidden_size": 33, "head_dim": None}, "hidden_size=33.*num_attention_heads=4.*head_dim"),
        ({"torch_dtype": "float8", "dtype": None}, "float8"),
    ],
)
def test_unsupported_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf({**V4, **changes})


def test_incomplete_layout_entry():
    with pytest.raises(ValueError, match="unigist entry has no 'window'"):
        layout_from_hf({"unigist": {"ratio": 4, "num_sinks": 3}})
    for entry in ([4, 3, 8], {"ratio": "4", "num_sinks": 3, "window": 8}):
        with pytest.raises(ValueError, match=r"is not what launch\.convert writes"):
            config_from_hf(V4 | {"unigist": entry})


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
def test_round_trip(tmp_path, dtype, tied, max_shard_bytes):
    model = tiny_model(param_dtype=dtype, dtype=dtype, tie_embeddings=tied)
    save_hf(model, tmp_path, max_shard_bytes=max_shard_bytes)
    loaded = load_hf(tmp_path)
    assert_same_bits(loaded, model)
    assert (loaded.config, loaded.layout) == (model.config, model.layout)
    files = sorted(path.name for path in tmp_path.iterdir())
    if max_shard_bytes > 20_000:
        assert files == ["config.json", "model.safetensors"]
        return
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert files == sorted({*index["weight_map"].values(), "config.json", "model.safetensors.index.json"})
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert len(files) > 4 and files[1] == f"model-00001-of-{len(files) - 2:05d}.safetensors"
    assert all(sum(x.nbytes for x in load_file(tmp_path / name).values()) <= 20_000 for name in files[1:-1])


def test_another_dtype_than_stored(saved):
    directory, model = saved
    loaded = load_hf(directory, param_dtype="bfloat16")
    assert_same_bits(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), model))
    save_hf(loaded, directory)
    assert_same_bits(load_hf(directory, param_dtype="float32"), jax.tree.map(lambda x: x.astype(jnp.float32), loaded))


def test_no_sinks(tmp_path):
    model = tiny_model(layout=GistLayout(4, 0, 8))
    save_hf(model, tmp_path)
    assert_same_bits(load_hf(tmp_path), model)
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    assert_same_bits(load_hf(tmp_path, mesh=mesh), model)


def test_saving_replaces_what_was_there(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    save_hf(tiny_model(0), tmp_path, max_shard_bytes=20_000)
    model = tiny_model(1)
    save_hf(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert_same_bits(load_hf(tmp_path), model)


def test_failed_save_leaves_what_was_there(saved, monkeypatch):
    directory, model = saved
    before = {path.name for path in directory.iterdir()}
    calls = []

    def full_disk(arrays, file, metadata):
        calls.append(file)
        save_file(arrays, file, metadata)
        if len(calls) == 2:
            raise OSError("no space left on device")

    monkeypatch.setattr("unigist_jax.model.hf_save.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_hf(tiny_model(1), directory, max_shard_bytes=20_000)
    assert {path.name for path in directory.iterdir()} == before
    assert_same_bits(load_hf(directory), model)


def test_sharded_load_equals_unsharded(saved, monkeypatch):
    directory, model = saved
    read, sizes = HfWeight.read, []

    def counted(self, stored, shape, index):
        out = read(self, stored, shape, index)
        sizes.append(out.size)
        return out

    monkeypatch.setattr(HfWeight, "read", counted)
    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    loaded = load_hf(directory, mesh=mesh)
    assert_same_bits(loaded, model)
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(model))  # no entry was read twice, or in vain
    assert len(loaded.layers.attention.query[...].addressable_shards) == 4
    assert loaded.layers.attention.query[...].addressable_shards[0].data.shape == (3, 16, 2, 16)
    shardings = jax.tree.leaves(tree_shardings(mesh, model))
    assert [leaf.sharding for leaf in jax.tree.leaves(loaded)] == shardings
    save_hf(loaded, directory)
    assert_same_bits(load_hf(directory), model)


def test_loading_holds_one_tensor_at_a_time(tmp_path):
    """Bytes that NumPy and Python hold at most while a model of many layers is loaded onto a mesh, from many files."""
    model = tiny_model(hidden_size=64, intermediate_size=2048, num_layers=12)
    save_hf(model, tmp_path, max_shard_bytes=3_000_000)
    parameters = [leaf.nbytes for leaf in jax.tree.leaves(model)]
    largest = 4 * 64 * 2048  # float32 of one layer's feed-forward matrix
    assert sum(parameters) > 36 * largest and max(parameters) == 12 * largest
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    load_hf(tmp_path, mesh=mesh)  # compiles
    tracemalloc.start()
    loaded = load_hf(tmp_path, mesh=mesh)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * largest
    assert_same_bits(loaded, model)


# --- layouts and new gists ------------------------------------------------------------------------------------------


def plain(directory):
    """Makes a saved directory a plain Llama checkpoint."""
    edit_config(directory, unigist=None)
    edit_tensors(directory, **{"unigist.gist_embedding": None, "unigist.sink_embedding": None})


def test_plain_checkpoint_gets_gists_from_a_seed(saved):
    directory, model = saved
    plain(directory)
    with pytest.raises(ValueError, match=r"plain Llama checkpoint.*GistLayout"):
        load_hf(directory)
    layout = GistLayout(8, 200, 16)
    a, b, c = (load_hf(directory, layout, seed=seed, gist_init_scale=0.5) for seed in (0, 0, 1))
    assert_same_bits(a, b)
    assert a.layout == layout and a.sink_embedding.shape == (200, 32)
    assert not np.array_equal(a.sink_embedding[...], c.sink_embedding[...])
    assert not np.array_equal(a.gist_embedding[...], c.gist_embedding[...])
    assert abs(float(jnp.std(a.sink_embedding[...])) - 0.5) < 0.05
    mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
    assert_same_bits(load_hf(directory, layout, mesh=mesh, gist_init_scale=0.5), a)
    assert np.array_equal(a.embedding[...], model.embedding[...])


def test_another_ratio_is_only_a_layout(saved):
    directory, model = saved
    layout = GistLayout(8, 3, 0)
    loaded = load_hf(directory, layout)
    assert loaded.layout == layout
    assert_same_bits(loaded, model)


def test_other_sinks_are_refused(saved):
    with pytest.raises(ValueError, match=r"num_sinks=5 asked for.*holds 3 trained sinks.*num_sinks=3"):
        load_hf(saved[0], GistLayout(4, 5, 8))


# --- bad directories ------------------------------------------------------------------------------------------------


def test_absent_files(saved, tmp_path):
    directory, _ = saved
    with pytest.raises(FileNotFoundError, match=r"nowhere.config\.json is absent.*local directory"):
        load_hf(directory / "nowhere")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor.*pytorch_model\.bin"):
        load_hf(directory)


@pytest.mark.parametrize("contents", ["{", "[]", '{"weight_map": '])
def test_damaged_config(saved, contents):
    (saved[0] / "config.json").write_text(contents)
    with pytest.raises(ValueError, match=r"config\.json .*download or copy it again"):
        load_hf(saved[0])


@pytest.mark.parametrize("damage", [lambda b: b[:-10], lambda b: b"", lambda b: b"version https://git-lfs.github.com"])
def test_damaged_weights(saved, damage):
    file = saved[0] / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or damaged.*copy it again"):
        load_hf(saved[0])


def test_bad_index(tmp_path):
    save_hf(tiny_model(), tmp_path, max_shard_bytes=20_000)
    shard = sorted(tmp_path.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{shard.name} is absent, but model\.safetensors\.index\.json names it"
    ):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json has no weight_map"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {
                f"model.layers.{layer}.mlp.{name}_proj.weight": None
                for layer in (0, 1)
                for name in ("up", "gate", "down")
            },
            r"lacks 6 tensors model\.layers\.\d\.mlp.* and 2 more: download the whole",
        ),
        ({"lm_head.weight": None}, r"lacks 1 tensor lm_head\.weight.*tie_word_embeddings"),
        ({"unigist.gist_embedding": None}, r"lacks 1 tensor unigist\.gist_embedding: .*drop"),
        (
            {"model.layers.1.self_attn.k_proj.weight": np.zeros((32, 33), np.float32)},
            r"model\.safetensors: model\.layers\.1\.self_attn\.k_proj\.weight has shape \(32, 33\).* it \(32, 32\)",
        ),
        ({"model.norm.weight": np.zeros(32, np.int8)}, r"model\.norm\.weight is of dtype I8.*bfloat16"),
        (
            {"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)},
            r"holds 1 tensor .*q_proj\.bias.*no place",
        ),
        ({"model.layers.3.mlp.up_proj.weight": np.zeros((48, 32), np.float32)}, r"holds 1 tensor .*layers\.3"),
    ],
)
def test_bad_tensors(saved, changes, message):
    edit_tensors(saved[0], **changes)
    with pytest.raises(ValueError, match=message):
        load_hf(saved[0])


def test_harmless_tensors_are_ignored_with_a_warning(tmp_path, caplog):
    model = tiny_model(tie_embeddings=True)
    save_hf(model, tmp_path)
    names = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "lm_head.weight")
    edit_tensors(tmp_path, **dict.fromkeys(names, np.zeros((64, 32), np.float32)))
    with caplog.at_level("WARNING", logger="absl"):
        assert_same_bits(load_hf(tmp_path), model)
    assert all(name in caplog.text for name in names)


def test_bad_arguments_of_save(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
        save_hf(tiny_model(), tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ValueError, match="took this model's layers apart: save it before"):
        save_hf(for_inference(tiny_model()), tmp_path / "out")
    assert not (tmp_path / "out").exists()
