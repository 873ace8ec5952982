"""Compiles the train step of a run for devices that are not here: whether it fits, before anything is rented.

TPUs need libtpu, GPUs jax's CUDA plugin and ptxas (`nvidia-cuda-nvcc`); no device is needed, and none is used.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from pallas_kernels.backends import compiling_for
from unigist_jax.config import RunConfig
from unigist_jax.model import init_llama
from unigist_jax.sharding import abstract_on, batch_sharding, make_mesh
from unigist_jax.training.flops import peak_flops, step_flops
from unigist_jax.training.step import Batch, abstract_state, make_train_step

GIB = 2**30
TPU_MEMORY = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # GiB of a device, from the vendor's data sheets
GPU_MEMORY = {"h100": 80, "h200": 141}  # GB, likewise; the target below is told the same

GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
  thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "NVIDIA {name}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for.

    Attributes:
      name: as asked for.
      devices: of an ahead-of-time topology.
      memory: bytes of one device.
    """

    name: str
    devices: Sequence[Any]
    memory: int


def find_target(name: str) -> Target:
    """The devices that a name stands for: `v5p:4x4x4`, `v6e:4x4` (TPU slices), `h100:8`, `h200:1` (GPUs of one host).

    Raises:
      ValueError: for an unknown name, or where the compiler for such devices is not installed.
    """
    kind, _, shape = name.partition(":")
    if kind in TPU_MEMORY and re.fullmatch(r"\d+(x\d+)+", shape):
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        options, memory, needed = {"platform": "tpu", "topology_name": name}, TPU_MEMORY[kind] * GIB, "libtpu"
    elif kind in GPU_MEMORY and shape.isdecimal() and int(shape) > 0:
        memory, needed = GPU_MEMORY[kind] * 10**9, "jax's CUDA plugin and nvidia-cuda-nvcc"
        config = GPU_TARGET.format(memory=memory, name=kind.upper())
        options = {"platform": "cuda", "target_config": config, "topology": f"1x1x{int(shape)}"}
    else:
        raise ValueError(
            f"--topology={name} is neither a TPU slice ({', '.join(TPU_MEMORY)}, as v5p:4x4x4) nor GPUs of one host "
            f"({', '.join(GPU_MEMORY)}, as h100:8)"
        )
    try:
        devices = topologies.get_topology_desc(**options).devices
    except Exception as error:  # jax raises what the missing plugin raises
        raise ValueError(
            f"there is no compiler for --topology={name} here; install {needed} ({type(error).__name__}: {error})"
        ) from error
    return Target(name, devices, memory)


def this_machine() -> Target:
    """The devices that are here; memory 0 where they do not tell theirs."""
    devices = jax.devices()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    return Target(f"{devices[0].platform}:{len(devices)}", devices, memory)


def abstract_batch(run: RunConfig, mesh: jax.sharding.Mesh, packed: bool = True) -> Batch:
    """A batch of the run by shape, on the mesh. `packed` False: rows that are one document each."""
    size, length = run.train.batch_size, run.data.row_length
    sharding = batch_sharding(mesh)

    def shaped(dtype, columns):
        return jax.ShapeDtypeStruct((size, columns), dtype, sharding=sharding)

    starts = shaped(jnp.int32, run.gist.num_units(length)) if packed else None
    return Batch(shaped(jnp.int32, length), starts, shaped(jnp.bool_, length))


def program_bytes(compiled: Any) -> dict[str, int]:
    """Bytes of one device that a program takes: arguments, temporaries, their peak together; and of the host."""
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    results = max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    return {
        "arguments": arguments,
        "temporary": temporary,
        "total": arguments + temporary + results,
        "host": memory.host_temp_size_in_bytes,
    }


def compile_step(run: RunConfig, target: Target, packed: bool = True) -> dict[str, Any]:
    """Compiles the run's train step for a target.

    Returns:
      Plain values: the mesh, bytes of one device, useful operations of one device and step, and the seconds that they
      take at half of the device's peak (None where that is unknown), a usual speed.

    Raises:
      ValueError: if the config does not fit the devices, or has no vocabulary yet.
    """
    if not run.model.vocab_size:
        raise ValueError("model.vocab_size=0 is taken from the tokenizer, which is not read here; set it")
    mesh = make_mesh(**dataclasses.asdict(run.mesh), devices=target.devices)
    run = dataclasses.replace(run, mesh=dataclasses.replace(run.mesh, **mesh.shape))
    teacher = None
    begin = time.perf_counter()
    with compiling_for(target.devices[0]), jax.set_mesh(mesh):
        if run.train.distill_weight:
            frozen = dataclasses.replace(run.model, param_dtype=run.model.dtype)
            teacher = abstract_on(mesh, jax.eval_shape(lambda: init_llama(frozen, run.gist, 0)))
        step = make_train_step(run, mesh)
        layout = min(run.layouts(), key=lambda layout: layout.ratio)  # the one with most positions
        lowered = step.lower(abstract_state(run, mesh), abstract_batch(run, mesh, packed), teacher, layout)
        compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    units = layout.num_units(run.data.row_length)
    documents = jnp.zeros((run.train.batch_size, units), jnp.int32)
    options = {"frozen": run.train.trainable == "gist", "teacher": teacher is not None}
    useful = float(step_flops(run.model, layout, documents, **options)) / len(target.devices)
    peak = peak_flops(target.devices[0])
    return {
        "target": target.name,
        "device": target.devices[0].device_kind,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "bytes": program_bytes(compiled),
        "device_bytes": target.memory,
        "useful_flops": useful,
        "seconds_at_half_of_peak": peak and 2 * useful / peak,
        "tokens_per_step": run.train.batch_size * run.data.row_length,
        "compile_seconds": round(seconds, 1),
    }


def describe(result: dict[str, Any]) -> str:
    """The result of `compile_step` in a few lines."""
    total, memory = result["bytes"]["total"], result["device_bytes"]
    fits = f"DOES NOT FIT by {(total - memory) / GIB:.1f} GiB" if total > memory > 0 else "fits"
    parts = ", ".join(f"{name} {result['bytes'][name] / GIB:.1f} GiB" for name in ("arguments", "temporary"))
    if host := result["bytes"]["host"]:
        parts += f"; {host / GIB:.1f} GiB of the host's"
    seconds, tokens = result["seconds_at_half_of_peak"], result["tokens_per_step"]
    speed = f"; at half of its peak {seconds:.2f} s, {tokens / seconds:,.0f} tokens/s" if seconds else ""
    return (
        f"{result['target']} ({result['device']}), mesh {result['mesh']}\n"
        f"memory of a device: {total / GIB:.2f} of {memory / GIB:.1f} GiB ({parts}): {fits}\n"
        f"a step of {tokens:,} raws: {result['useful_flops'] / 1e12:,.3f} useful TFLOP a device{speed}"
    )
