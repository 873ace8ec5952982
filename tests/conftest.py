"""Before anything imports the packages: eight virtual CPU devices, a quick compiler, and checked annotations.

The tests compile many programs and run each for an instant, so XLA skips LLVM's costly passes. jaxtyping's annotations
are checked by beartype here and nowhere else.
"""

import os
from importlib.metadata import version

JAX_0_10 = version("jax").startswith("0.10.")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false" if JAX_0_10 else "",  # later releases do not know it, nor need it
    ]
)

from jaxtyping import install_import_hook  # noqa: E402

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
