"""What the TPU kernels cost by the TPU compiler's account, on a machine without a TPU. Nothing is timed or run.

    python -m launch.bench_tpu_compile --chips=v5e,v5p,v6e --out=tpu_compile.json     # needs libtpu: make test-tpu

For each chip, head dim, length and ratio it compiles forward and backward of gist attention ahead of time, and beside
it jax's splash attention, causal on the same raws. It records:

  kernels   for each kernel its vector memory as the compiler allotted it, and the operations and bytes that it does and
            moves: ours from the estimate that the kernel hands to the compiler (its tables counted in closed form;
            tests/test_tpu.py holds them to the tables), splash's counted here from its visited blocks
  program   of the whole executable: operations and bytes as the compiler adds them up (splash hands it no estimate, so
            its kernels count as nothing there), and the temporary memory that it reserves in HBM
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import SingleDeviceSharding

from launch.flags import run_main, whole_numbers
from pallas_kernels.backends import compiling_for
from pallas_kernels.gist_attention import GistKV, gist_attention
from unigist_jax.layout import GistLayout

CHIPS = flags.DEFINE_list("chips", ["v5e", "v5p", "v6e"], "TPUs to compile for")
LENGTHS = flags.DEFINE_list("lengths", ["4096", "32768"], "raw tokens")
RATIOS = flags.DEFINE_list("ratios", ["4", "8"], "raw tokens per gist")
DIMS = flags.DEFINE_list("dims", ["64", "128"], "head dims")
HEADS = flags.DEFINE_integer("heads", 32, "query heads")
KV_HEADS = flags.DEFINE_integer("kv_heads", 8, "KV heads")
SINKS = flags.DEFINE_integer("sinks", 128, "sinks")
WINDOW = flags.DEFINE_integer("window", 128, "local window in raw tokens")
SPLASH_BLOCK = flags.DEFINE_integer("splash_block", 512, "all block sizes of splash attention")
OUT = flags.DEFINE_string("out", "", "file for the raw JSON")

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def device_of(chip: str):
    """A device to compile for. Raises ValueError for an unknown chip or without libtpu."""
    if chip not in TOPOLOGIES:
        raise ValueError(f"--chips={chip}: choose among {sorted(TOPOLOGIES)}")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(f"there is no TPU compiler here ({error}); install libtpu: make test-tpu") from error


def gist_case(shaped, ratio: int, length: int, dim: int):
    """Gist attention as a function of its arguments, and their shapes."""
    layout = GistLayout(ratio, SINKS.value, WINDOW.value)
    lengths = (layout.num_sinks,), (1, length // ratio), (1, length)
    kv = GistKV(*(shaped(*n, KV_HEADS.value, dim) for n in lengths for _ in (0, 1)))
    return functools.partial(gist_attention, layout=layout), (shaped(1, length + length // ratio, HEADS.value, dim), kv)


def splash_case(shaped, length: int, dim: int):
    """Splash attention, causal, on the arrays as a model has them: [B, T, heads, D]."""
    group, block = HEADS.value // KV_HEADS.value, min(SPLASH_BLOCK.value, length)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash_attention.BlockSizes(**{f"block_{name}": block for name in names})
    mask = splash_attention.MultiHeadMask([splash_attention.CausalMask((length, length)) for _ in range(group)])
    kernel = splash_attention.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(q, kv):
        q = q.reshape(1, length, KV_HEADS.value, group, dim).transpose(0, 2, 3, 1, 4) * dim**-0.5
        k, v = (x.transpose(0, 2, 1, 3) for x in kv)
        out = jax.vmap(jax.vmap(kernel))(q, k, v)
        return out.transpose(0, 3, 1, 2, 4).reshape(1, length, HEADS.value, dim)

    return attend, (shaped(1, length, HEADS.value, dim), tuple(shaped(1, length, KV_HEADS.value, dim) for _ in (0, 1)))


def splash_count(name: str, length: int, dim: int) -> dict:
    """Operations and bytes of one of splash's kernels: its visited blocks, and the tiles copied for each."""
    block = min(SPLASH_BLOCK.value, length)
    tiles, tile = length // block, block * dim * 2
    pairs = HEADS.value * tiles * (tiles + 1) // 2
    products = {"fwd": 2, "dq": 3, "dkv": 4}[name]
    once = HEADS.value * tiles * tile * {"fwd": 2, "dq": 3, "dkv": 0}[name]
    once += KV_HEADS.value * tiles * tile * {"fwd": 0, "dq": 0, "dkv": 4}[name]
    return {"flops": 2 * products * pairs * block * block * dim, "bytes": once + pairs * 2 * tile}


def kernels_in(text: str) -> dict:
    """Name, vector memory and handed-in estimate of each kernel in a compiled program's text."""
    found = {}
    for call in re.finditer(r'%(\S+) = [^\n]*custom_call_target="tpu_custom_call"', text):
        name = re.search(r"gist_attention_(forward|backward_kv|backward_q)|splash_mqa_(fwd|dkv|dq)", call[1])
        memory = re.compile(r'"used_scoped_memory_configs":\[\{[^}]*"size":"(\d+)"').search(text, call.end())
        entry = {"vmem_bytes": int(memory[1])}
        estimate = re.compile(r'"cost_estimate":\{"flops":"(\d+)"[^}]*"bytes_accessed":"(\d+)"')
        if handed_in := estimate.search(text, call.end(), memory.start()):
            entry |= {"flops": int(handed_in[1]), "bytes": int(handed_in[2])}
        found[name[1] or name[2]] = entry
    return found


def measure(device, attend, shapes) -> dict:
    """Compiles forward and backward for a device and reads off the figures."""
    with compiling_for(device):
        both = jax.jit(lambda q, kv, d_out: jax.vjp(attend, q, kv)[1](d_out))
        compiled = both.lower(*shapes, shapes[0]).compile()
    totals, memory = compiled.cost_analysis(), compiled.memory_analysis()
    program = {"flops": totals["flops"], "bytes": totals["bytes accessed"], "temp_bytes": memory.temp_size_in_bytes}
    program["argument_bytes"] = memory.argument_size_in_bytes
    return {"kernels": kernels_in(compiled.as_text()), "program": program}


def table_line(row: dict) -> str:
    """A line of a Markdown table: operations and bytes of the kernels, the most vector memory of one, HBM besides."""
    kernels = row["kernels"]
    forward = [kernel for name, kernel in kernels.items() if name in ("forward", "fwd")]
    backward = [kernel for kernel in kernels.values() if kernel not in forward]
    work = [
        f"{sum(k['flops'] for k in part) / 1e9:,.0f}, {sum(k['bytes'] for k in part) / 1e6:,.0f}"
        for part in (forward, backward)
    ]
    vmem = max(kernel["vmem_bytes"] for kernel in kernels.values()) / 2**20
    temporary = row["program"]["temp_bytes"] / 1e6
    cells = row["chip"], row["dim"], row["length"], row["op"], *work, f"{vmem:.1f}", f"{temporary:,.0f}"
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main(_: list[str]) -> None:
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    lengths, ratios, dims = map(whole_numbers, (LENGTHS, RATIOS, DIMS))
    devices = {chip: device_of(chip) for chip in CHIPS.value}
    result = {
        "command": " ".join(["python -m launch.bench_tpu_compile", *sys.argv[1:]]),
        "jax": jax.__version__,
        "shape": {"batch": 1, "heads": HEADS.value, "kv_heads": KV_HEADS.value, "dtype": "bfloat16"},
        "layout": {"sinks": SINKS.value, "window": WINDOW.value},
        "splash_block": SPLASH_BLOCK.value,
        "rows": [],
    }

    def record(case, figures):
        result["rows"].append(case | figures)
        print(table_line(result["rows"][-1]), flush=True)
        if OUT.value:
            with open(OUT.value, "w") as file:
                json.dump(result, file, indent=1)

    print(
        "| chip | dim | raws | op | forward GFLOP, MB | backward GFLOP, MB | VMEM MiB | temporary MB |",
        "|---" * 8 + "|",
        sep="\n",
    )
    for chip, device in devices.items():
        place = SingleDeviceSharding(device)

        def shaped(*shape, place=place):
            return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)

        for dim in dims:
            for length in lengths:
                case = {"chip": chip, "dim": dim, "length": length}
                for ratio in ratios:
                    figures = measure(device, *gist_case(shaped, ratio, length, dim))
                    record(case | {"op": f"gist r={ratio}"}, figures)
                figures = measure(device, *splash_case(shaped, length, dim))
                for name in figures["kernels"]:
                    figures["kernels"][name] |= splash_count(name, length, dim)
                record(case | {"op": "splash causal"}, figures)


if __name__ == "__main__":
    run_main(main)
