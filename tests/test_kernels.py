"""Every backend that this machine can run, over one grid of cases (kernel_cases.py), against the float32 oracle.

On a CPU: the XLA paths, the Triton kernels by Triton's interpreter, the Hopper kernels by hopper_emulator.py. On a GPU
(conftest.py would hide it):

    XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest --noconftest tests/test_kernels.py -k gpu

There the inputs are fresh in every run, memory is filled with NaN before, and every run is repeated and must give equal
bits. A backend that cannot run on this machine is skipped once, by `test_a_backend_without_its_device`, which says why.
"""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import kernel_cases
import numpy as np
import pytest
from kernel_cases import ATTENTION, DECODING, PARTS

from pallas_kernels import gist_attention
from pallas_kernels.backends import BACKENDS, choose, compiling_for, usable_backends
from unigist_jax.layout import GistLayout

PLATFORM = jax.devices()[0].platform.replace("cuda", "gpu")
HERE = os.path.dirname(os.path.abspath(__file__))

# --- how each backend runs here ---------------------------------------------------------------------------------------


def in_a_process(script: str) -> dict[str, np.ndarray]:
    """What a script runs of the small cases (`kernel_cases.elsewhere`): values by "case/part"."""
    with tempfile.TemporaryDirectory() as directory:
        file = os.path.join(directory, "results.npz")
        command = [sys.executable, os.path.join(HERE, script), file]
        env = os.environ | {"PYTHONPATH": os.path.dirname(HERE)}
        done = subprocess.run(command, env=env, capture_output=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        with np.load(file) as found:
            return dict(found)


# Backends that can run on a CPU though it is not their device: the packages that they need for it, and the script.
ELSEWHERE = {"triton": (("triton", "torch"), "triton_interpreter.py"), "hopper": ((), "hopper_emulator.py")}

HOME = [name for name in BACKENDS if name in usable_backends()]  # those that run on this machine's own device
CASES = [name for name, case in ATTENTION.items() if case.small or PLATFORM != "cpu"]
STEPS = [name for name, case in DECODING.items() if case.small or PLATFORM != "cpu"]
at_home = pytest.mark.parametrize("backend", [pytest.param(name, id=f"{PLATFORM}-{name}") for name in HOME])
# on an accelerator the inputs are new in every run, the same for every backend
SEED = None if PLATFORM == "cpu" else np.random.SeedSequence().entropy


@pytest.fixture(autouse=True)
def tell_the_seed():
    """pytest shows it where a test fails."""
    print("SEED =", SEED)


def poison() -> None:
    """The allocator hands this memory to the outputs: an entry that a kernel leaves unwritten shows as NaN."""
    if PLATFORM != "cpu":
        jax.block_until_ready([jnp.full((2**24,), jnp.nan, jnp.float32) for _ in range(8)])


# --- the grid ---------------------------------------------------------------------------------------------------------


# test_tpu.py runs the small cases for "tpu", in Pallas's interpreter
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name not in (*HOME, "tpu")])
def test_a_backend_without_its_device(backend):
    """Runs what can run of it here, or says why nothing can."""
    needed, script = ELSEWHERE.get(backend, ((), None))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if script is None or PLATFORM != "cpu" or missing:
        also = f"; to run elsewhere it needs {' and '.join(missing)}" if missing else ""
        pytest.skip(f"{backend} {BACKENDS[backend].obstacle(jax.devices()[0])}{also}")
    found, failed = in_a_process(script), []
    for name, case in kernel_cases.elsewhere():
        try:
            if isinstance(case, kernel_cases.Case):
                parts = {part: found[f"{name}/{part}"] for part in PARTS}
                kernel_cases.check(parts, case)
            else:
                kernel_cases.check_decoding(found[f"{name}/out"], case, kernel_cases.decode_inputs(case))
        except AssertionError as error:
            failed.append(f"{name}: {error}")
    assert not failed, "\n".join(failed)


@at_home
@pytest.mark.parametrize("name", CASES)
def test_attention_and_gradients_match_the_oracle(backend, name):
    case = ATTENTION[name]
    given = kernel_cases.inputs(case, SEED)
    run = kernel_cases.compiled(kernel_cases.public(backend), case, given)
    poison()
    found = run(given)
    if PLATFORM != "cpu":
        again = run(given)
        assert all((found[part] == again[part]).all() for part in PARTS), "two runs differ"
    kernel_cases.check(found, case, SEED)


@at_home
@pytest.mark.parametrize("name", STEPS)
def test_decoding_matches_the_oracle(backend, name):
    case = DECODING[name]
    given = kernel_cases.decode_inputs(case, SEED)
    reason = importlib.import_module(BACKENDS[backend].module).decode_refusal(*given[:2], case.layout)
    if reason:
        pytest.skip(f"{backend} {reason}")
    poison()
    found = kernel_cases.decoded(kernel_cases.public_decode(backend), case, given)
    kernel_cases.check_decoding(found, case, given)


@at_home
def test_chunks_equal_one_pass(backend):
    if PLATFORM == "cpu":
        case, cut = kernel_cases.small(7, sinks=16), 3
    else:
        case, cut = kernel_cases.Case(150, sinks=16, window=64), 70
    units, r = case.units, case.ratio
    given = kernel_cases.inputs(case, SEED)

    @functools.partial(jax.jit, static_argnums=1)
    def run(q, first):
        return gist_attention(q, given.kv, case.layout, first_unit=first, backend=backend)

    def part(x, first, last):
        raws, gists = x[:, r * first : r * last], x[:, r * units + first : r * units + last]
        return jnp.concatenate([raws, gists], axis=1)

    whole = run(given.q, 0)
    for first, last in ((0, cut), (cut, units)):
        chunk = run(part(given.q, first, last), first)
        assert kernel_cases.relative(chunk, part(whole, first, last)) < kernel_cases.TOLERANCE[case.dtype]


# --- the choice of a backend ------------------------------------------------------------------------------------------


def device(platform, kind, **attributes):
    return SimpleNamespace(platform=platform, device_kind=kind, **attributes)


H100 = device("cuda", "H100", compute_capability="9.0")
A100 = device("cuda", "A100", compute_capability="8.0")
V100 = device("cuda", "V100", compute_capability="7.0")
TPU = device("tpu", "TPU v5e")
CPU = device("cpu", "cpu")


@pytest.fixture
def arguments():
    case = kernel_cases.small(2)
    given = kernel_cases.inputs(case)
    return given.q, given.kv, case.layout


@pytest.fixture
def triton_there(monkeypatch):
    """As on a machine with the packages; the backend's module needs triton alone until a kernel is called."""
    pytest.importorskip("triton")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_triton" or find(name))


@pytest.mark.parametrize(("target", "expected"), [(A100, "triton"), (V100, "blocked"), (CPU, "blocked")])
def test_the_default_by_device(target, expected, arguments, triton_there):
    with compiling_for(target):
        assert choose(None, *arguments)[0] == expected
        assert choose(None, *arguments, decode=True)[0] == expected


def test_the_default_on_hopper(arguments, triton_there):
    expected = "hopper" if jax.__version_info__ >= (0, 11) else "triton"
    with compiling_for(H100):
        assert choose(None, *arguments)[0] == expected
        assert choose(None, *arguments, decode=True)[0] == expected


def test_the_default_on_tpu(arguments):
    with compiling_for(TPU):
        assert choose(None, *arguments)[0] == "tpu"
        step = kernel_cases.decode_inputs(kernel_cases.DECODING["ragged, every phase of a unit"])[:2]
        assert choose(None, *step, arguments[2], decode=True)[0] == "tpu"


def test_the_default_skips_a_backend_that_does_not_take_the_arguments(arguments, triton_there):
    q, kv, layout = arguments
    wide = kernel_cases.on_cpu((q, kv), jnp.float32)
    with compiling_for(A100):
        assert choose(None, *wide, layout)[0] == "blocked"
        with pytest.raises(ValueError, match=r'"triton" takes q and kv .* got float32; here "blocked", "reference"'):
            choose("triton", *wide, layout)
        with pytest.raises(ValueError, match=r"takes head dims \(64, 128\), got 32"):
            narrow = jax.tree.map(lambda x: x[..., :32], (q, kv))
            choose("triton", *narrow, layout)


def test_a_backend_that_cannot_work_here_says_why_and_which_can(arguments):
    with (
        compiling_for(CPU),
        pytest.raises(ValueError, match=r'"triton" needs an NVIDIA GPU .* 8\.0 .* this is cpu; here'),
    ):
        choose("triton", *arguments)
    with compiling_for(V100), pytest.raises(ValueError, match=r"this is V100; here \"blocked\", \"reference\" or None"):
        choose("triton", *arguments)
    with compiling_for(A100), pytest.raises(ValueError, match=r"compute capability 9\.x, this is A100|needs jax 0\.11"):
        choose("hopper", *arguments)


def test_missing_packages_are_named(arguments, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with compiling_for(A100):
        assert "triton" not in usable_backends()
        with pytest.raises(ValueError, match=r"needs the packages triton and jax-triton \(requirements-gpu"):
            choose("triton", *arguments)


def test_decoding_refuses_too_many_heads_a_kv_head(triton_there):
    layout = GistLayout(4, 0, 0)
    case = kernel_cases.Decoding([3], 2, sinks=0, window=0, dim=64, heads=65, kv_heads=1)
    q, kv, _ = kernel_cases.decode_inputs(case)
    with compiling_for(A100), pytest.raises(ValueError, match="decodes at most 64 query heads per KV head, got 65"):
        choose("triton", q, kv, layout, decode=True)
