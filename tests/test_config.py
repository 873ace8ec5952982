"""The run config, and the mesh."""

import importlib
import json
from pathlib import Path

import jax
import pytest

from unigist_jax.config import RunConfig, config_differences, default_config
from unigist_jax.model import RopeScaling
from unigist_jax.sharding import MESH_AXES, PARAMETER_AXES, make_mesh, partition_spec

CONFIGS = sorted(path.stem for path in (Path(__file__).parent.parent / "configs").glob("[!_]*.py"))


# --- config -----------------------------------------------------------------------------------------------------------


def run_with(**fields):
    """The default run with some fields changed: `run_with(train__steps=3)`."""
    config = default_config().to_dict()
    for name, value in fields.items():
        section, field = name.split("__")
        config[section][field] = value
    return RunConfig.from_dict(config)


def test_dicts_and_json_round_trip():
    run = run_with(model__rope_scaling={"factor": 4.0}, train__steps=50, model__attention_backend="reference")
    assert run.model.rope_scaling == RopeScaling(factor=4.0)
    assert RunConfig.from_dict(run.to_dict()) == run
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_is_a_valid_run(name):
    module = importlib.import_module(f"configs.{name}")
    run = RunConfig.from_dict(module.get_config().to_dict())
    assert run.with_vocab_size(run.model.vocab_size or 1024).model.vocab_size >= 1024
    assert f"configs/{name}.py" in module.__doc__  # it tells its own command


def test_a_backend_can_be_set_where_none_is():
    config = default_config().lock()
    assert RunConfig.from_dict(config.to_dict()).model.attention_backend is None
    config.model.attention_backend = "blocked"
    assert RunConfig.from_dict(config.to_dict()).model.attention_backend == "blocked"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train__step": 1}, r"unknown config field 'step' in 'train'; did you mean 'steps'\?"),
        ({"optim__zzz": 1}, r"unknown config field 'zzz' in 'optim'; the fields are \['b1', 'b2'"),
        ({"model__rope_scaling": {"factr": 8.0}}, r"'factr' in 'model.rope_scaling'; did you mean 'factor'\?"),
        ({"gist__window": 30}, r"window=30 .*ratio=4; the nearest legal window is 32"),
        ({"gist__ratio": 0}, "ratio=0.*use ratio >= 1"),
        ({"data__row_length": 510}, r"510 .*ratio=4; pad it to 512"),
        ({"data__heldout_fraction": 1.0}, "data.heldout_fraction=1.0 must be between 0 and 1"),
        ({"data__recall_weight": 1.5}, "data.recall_weight=1.5 must be between 0 and 1"),
        ({"data__source": ""}, "data.source is empty; give 'stdlib'"),
        ({"optim__peak_lr": 0.0}, "optim.peak_lr=0.0 must be positive"),
        ({"optim__warmup_steps": 100}, "optim.warmup_steps=100 must be below train.steps=100"),
        ({"train__batch_size": 0}, "train.batch_size=0 must be at least 1"),
        ({"mesh__data": 3}, "train.batch_size=8 is not a multiple of mesh data . fsdp = 3"),
        ({"train__accumulate": 3}, "batch_size=8 is not a multiple of train.accumulate=3"),
        (
            {"train__accumulate": 4, "mesh__data": 1, "mesh__fsdp": 4},
            "train.batch_size=8 is not a multiple of .*accumulate=4",
        ),
        ({"train__mixed_ratios": "2,3"}, "train.mixed_ratios='2,3' must be .* divisors of gist.ratio=4"),
        ({"train__trainable": "head"}, "train.trainable='head' is unknown; choose one of .*'gist'"),
        ({"train__distill_weight": 0.5, "mesh__context": 2}, "full attention.* use fsdp or tensor"),
        ({"optim__state_dtype": "int8"}, "optim.state_dtype='int8' is unknown; choose 'float32' or"),
        ({"mesh__tensor": 4}, "mesh.tensor=4 does not divide model.num_kv_heads=2"),
        ({"mesh__tensor": 2, "model__vocab_size": 321}, "mesh.tensor=2 does not divide model.vocab_size=321"),
        ({"mesh__fsdp": 3, "train__batch_size": 9}, "mesh.fsdp=3 does not divide model.hidden_size=128"),
        ({"model__attention_backend": "flash"}, "'flash'; choose one of.*'blocked'"),
        ({"mesh__context": 2, "model__attention": "full"}, "mesh.context=2 needs model.attention='gist', not 'full'"),
        (
            {"mesh__context": 4, "data__row_length": 256},
            "mesh.context=4: .* pieces of 8 units.*the window's 32",
        ),
        ({"model__dtype": "int8"}, "dtype='int8' is unknown; choose one of.*float32"),
        ({"model__num_heads": 3}, "num_heads=3 is not a multiple of num_kv_heads=2"),
    ],
)
def test_errors_name_field_value_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        run_with(**fields)


@pytest.mark.parametrize(
    ("path", "message"),
    [(("gist",), r"\['gist'\] are missing"), (("model", "num_heads"), r"\['num_heads'\] are missing in 'model'")],
)
def test_missing_fields_are_named(path, message):
    config = default_config().to_dict()
    section = config if len(path) == 1 else config[path[0]]
    del section[path[-1]]
    with pytest.raises(ValueError, match=message):
        RunConfig.from_dict(config)


def test_the_vocabulary_is_the_tokenizers_or_larger():
    assert run_with().with_vocab_size(500).model.vocab_size == 500
    assert run_with(model__vocab_size=512).with_vocab_size(500).model.vocab_size == 512
    with pytest.raises(ValueError, match=r"model.vocab_size=400 is smaller than the tokenizer's 500; set it to 0"):
        run_with(model__vocab_size=400).with_vocab_size(500)


def test_differences_name_every_changed_field():
    old, new = run_with().to_dict(), run_with(train__steps=50, model__rope_scaling={}).to_dict()
    lines = config_differences(old, new)
    assert lines[1] == "train.steps: 100 -> 50"
    assert lines[0].startswith("model.rope_scaling: None -> {'factor': 8.0")
    assert config_differences(old, old) == []


# --- mesh -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"tensor": 2}, (4, 1, 1, 2)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 1, 2)),
        ({"data": 1, "context": -1}, (1, 1, 8, 1)),
    ],
)
def test_a_mesh_takes_all_devices(sizes, shape):
    assert tuple(make_mesh(**sizes).shape.items()) == tuple(zip(MESH_AXES, shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "needs 3 devices, but there are 8"),
        ({"tensor": 3}, "needs 6 devices, but there are 8"),
        ({"data": 0}, "'data': 0.*sizes are positive"),
        ({"fsdp": -1}, "at most one of them is -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_a_mesh_axis_splits_one_axis_of_an_array():
    assert partition_spec("batch", None, "heads") == jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
    for axes in PARAMETER_AXES.values():
        partition_spec(*axes)
    for axes in (("batch", "embed"), ("heads", "mlp")):
        with pytest.raises(ValueError, match="one mesh axis is used twice"):
            partition_spec(*axes)
