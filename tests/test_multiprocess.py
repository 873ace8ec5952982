"""Two processes train as one does: the same losses from the same command, started twice."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from quick_compiler import QUICK
from tiny_runs import SPEED, write_corpus

from unigist_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
TIMEOUT = 240  # seconds; a hang fails with both logs

CONFIG = """
from unigist_jax.config import default_config

def get_config():
    config = default_config()
    config.model.update(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32",
        attention_backend="reference",
    )
    config.gist.update(ratio=4, num_sinks=2, window=8)
    config.data.update(source={source!r}, vocab_size=320, row_length=32, heldout_fraction=0.3)
    config.optim.update(warmup_steps=1)
    config.train.update(steps=5, batch_size=8, eval_every=5, eval_rows=11, checkpoint_every=3)
    config.mesh.update(data=2, fsdp=2)
    return config
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    source = write_corpus(folder / "corpus", longest=200)
    (folder / "config.py").write_text(CONFIG.format(source=source))
    return folder / "config.py"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_training(config_file, workdir, devices, *flags):
    command = [sys.executable, "-m", "launch.train", f"--config={config_file}", f"--workdir={workdir}"]
    command += ["--platform=cpu", "--noprogress", *flags]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(processes, code=0):
    """Waits for all of them and returns their logs; fails with every log if one ends with another code or hangs."""
    logs, codes = [], []
    try:
        for process in processes:
            try:
                log = process.communicate(timeout=TIMEOUT)[0]
            except subprocess.TimeoutExpired:
                process.kill()
                log = f"{process.communicate()[0]}\n(killed after {TIMEOUT} s)"
            logs.append(log)
            codes.append(process.returncode)
    finally:
        for process in processes:
            process.kill()
    report = "\n".join(
        f"--- process {i}, exit code {c}\n{log}" for i, (c, log) in enumerate(zip(codes, logs, strict=True))
    )
    assert codes == [code] * len(processes), report
    return logs


def start_two(config_file, workdir, *further):
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [
        start_training(config_file, workdir, 2, address, "--num_processes=2", f"--process_id={index}", *further)
        for index in range(2)
    ]


def test_two_processes_train_as_one(config_file, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    finish([start_training(config_file, one, devices=4)])
    finish(start_two(config_file, two))
    alone, together = read_metrics(one), read_metrics(two)
    assert [line["step"] for line in together] == [1, 2, 3, 4, 5, 5] == [line["step"] for line in alone]
    for got, expected in zip(together, alone, strict=True):
        assert got.keys() == expected.keys()
        for name in got.keys() - SPEED:
            np.testing.assert_allclose(got[name], expected[name], rtol=2e-6, err_msg=f"{name} at step {got['step']}")
    assert (two / "checkpoints" / "5").is_dir()


def test_all_processes_tell_why_the_first_one_ended(config_file, tmp_path):
    first, second = finish(start_two(config_file, tmp_path / "run", "--config.data.source=/nowhere/*.txt"), code=2)
    reason = re.search(r"^error: (.*)$", first, re.MULTILINE)[1]  # among what the network's library says
    assert "/nowhere/*.txt" in reason and f"error: process 0 ended with: {reason}" in second
