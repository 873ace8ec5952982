"""Before anything imports the packages: eight virtual CPU devices, a quick compiler, and checked annotations.

jaxtyping's annotations are checked by beartype here and nowhere else.
"""

import os

from quick_compiler import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
# XLA's threads. A collective keeps one until its last device arrives, and jax 0.11 starts several at once: with as many
# threads as devices, its default on few cores, all may wait, and the process is aborted after 40 seconds.
os.environ["NPROC"] = "32"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICK}"

from jaxtyping import install_import_hook

install_import_hook(["unigist_jax", "pallas_kernels"], "beartype.beartype")

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Runs of one config compile the same programs: they share them through jax's cache on disk."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = [getattr(jax.config, name) for name in names]

    def set_to(*values):
        for name, value in zip(names, values, strict=True):
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    set_to(str(tmp_path_factory.mktemp("compiled")), 0.0)
    yield
    set_to(*before)
