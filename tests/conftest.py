"""Before anything imports the packages: eight virtual CPU devices, a quick compiler, and checked annotations.

The tests compile many programs and run each for an instant, so XLA skips LLVM's costly passes. jaxtyping's annotations
are checked by beartype here and nowhere else.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

from jaxtyping import install_import_hook

install_import_hook(["unigist_jax", "pallas_kernels"], "beartype.beartype")

import hypothesis  # noqa: E402

hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("suite")
