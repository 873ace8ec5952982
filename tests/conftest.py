"""Eight virtual CPU devices, and jaxtyping annotations checked by beartype: both before anything imports the packages."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["unigist_jax", "pallas_kernels"], "beartype.beartype")

import hypothesis  # noqa: E402

hypothesis.settings.register_profile("suite", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("suite")
