"""The tiny run that the tests of training share."""

import jax
import numpy as np
from quick_compiler import QUICK

from unigist_jax.config import default_config
from unigist_jax.sharding import parameter_path


def tiny_config(source="stdlib", tokenizer=""):
    config = default_config()
    config.model.update(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        rope_theta=10_000.0, dtype="float32",
    )  # fmt: skip
    config.gist.update(ratio=4, num_sinks=2, window=8)
    config.data.update(source=source, tokenizer=tokenizer, row_length=32, heldout_fraction=0.3)
    config.optim.update(peak_lr=3e-3, warmup_steps=2)
    config.train.update(steps=7, batch_size=8, eval_every=4, eval_rows=8, checkpoint_every=3)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    return config


def named_arrays(tree):
    """Parameters as NumPy arrays by path; copies, which outlive the donation of their originals."""
    return {parameter_path(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same_bits(got, expected):
    got, expected = named_arrays(got), named_arrays(expected)
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].tobytes() == array.tobytes(), name


def write_corpus(folder, longest, documents=12):
    """Documents of up to `longest` words in `folder`, made if absent; the folder's name, as `data.source` takes it."""
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    for index in range(documents):
        words = [f"w{number:x}" for number in rng.integers(0, 400, size=rng.integers(5, longest))]
        (folder / f"{index}.txt").write_text(f"document {index}\n\n" + " ".join(words) + "\n")
    return str(folder)


QUICK_CONFIG = """
from unigist_jax.config import default_config

def get_config():
    config = default_config()
    config.model.update(
        hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, dtype="float32",
        attention_backend="reference",
    )
    config.gist.update(ratio=4, num_sinks=2, window=8)
    config.data.update(source={source!r}, vocab_size=320, row_length=32, heldout_fraction=0.3)
    config.optim.update(warmup_steps=1)
    config.train.update(steps={steps}, batch_size=4, eval_every=100, eval_rows=4, checkpoint_every=10_000)
    return config
"""


def write_quick_config(folder, steps):
    """A corpus and `config.py` in `folder` for runs that are soon compiled and take many quick steps; the file."""
    source = write_corpus(folder / "corpus", longest=200)
    (folder / "config.py").write_text(QUICK_CONFIG.format(source=source, steps=steps))
    return folder / "config.py"


def quick_environment(folder):
    """Variables for runs in processes of their own: they compile quickly, and each program once for all of them."""
    return {
        "XLA_FLAGS": QUICK,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


SPEED = {"tokens_per_second", "model_tokens_per_second"}


def without_speed(lines):
    """Lines of metrics.jsonl but for what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in SPEED} for line in lines]
