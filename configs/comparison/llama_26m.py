"""The comparison at 26M parameters, for some minutes of one GPU: `llama_100m.py`, smaller and shorter.

python -m launch.sweep --config=configs/comparison/llama_26m.py --sweep=configs/comparison/methods.py

39M tokens a method.
"""

from configs.comparison import llama_100m


def get_config():
    config = llama_100m.get_config()
    config.model.update(hidden_size=512, intermediate_size=1408, num_layers=8, num_heads=8, remat="none")
    config.data.recall_records = 2048
    config.optim.update(peak_lr=2e-3, warmup_steps=100)
    config.train.update(steps=1200, batch_size=16, eval_every=400, checkpoint_every=1200, eval_recall_rows=0)
    return config
