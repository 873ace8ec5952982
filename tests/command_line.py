"""Commands as the tests of them run them.

Each runs in a process of its own, as `python -m launch.NAME` would; the processes are forked from one that has
imported the libraries already, which saves seconds each.
"""

import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

from quick_compiler import QUICK

ROOT = Path(__file__).parent.parent
LIBRARIES = ("jax", "flax.nnx", "optax", "orbax.checkpoint", "datasets", "sentencepiece", "matplotlib.figure", "grain")
TIMEOUT = 200


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def run_in_child(name, arguments, out, err):
    os.environ["XLA_FLAGS"] = QUICK
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    sys.argv[1:] = arguments
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)


def runner(folder):
    """`command(name, *arguments)`, which runs one to its end and keeps what it says in `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    numbers = iter(range(1000))

    def run(name, *arguments):
        number = next(numbers)
        out, err = folder / f"{number}.out", folder / f"{number}.err"
        process = context.Process(target=run_in_child, args=(name, [str(a) for a in arguments], str(out), str(err)))
        process.start()
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
        assert out.exists() and err.exists(), f"{name} did not start, exit code {process.exitcode}"
        return Finished(process.exitcode, out.read_text(), err.read_text())

    return run


def assert_refused(finished, *parts):
    """Exit code 2 and one clear line that holds all parts, in order."""
    assert finished.code == 2, finished.err
    assert re.fullmatch(r"error: .*\n", finished.err), finished.err
    assert re.search(".*".join(map(re.escape, parts)), finished.err), finished.err
    assert not finished.out.strip()
