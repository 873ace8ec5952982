"""A model of 0.16M parameters for sweeps on a CPU: `tiny.py`, smaller and shorter.

python -m launch.sweep --config=configs/micro.py --sweep=configs/sweeps/ratio.py --jobs=2

About a minute a run on 2 CPU cores; docs/sweeps.md shows all of configs/sweeps at this size.
"""

from configs import tiny


def get_config():
    config = tiny.get_config()
    config.model.update(hidden_size=64, intermediate_size=176, num_layers=2, num_heads=2, num_kv_heads=1)
    config.train.update(steps=100, batch_size=4, eval_every=100)
    return config
