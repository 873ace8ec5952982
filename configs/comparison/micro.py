"""The comparison at 0.3M parameters on a CPU: it shows that the way from training to the table works, and no more.

python -m launch.sweep --config=configs/comparison/micro.py --sweep=configs/comparison/methods_micro.py
"""

from configs.comparison import llama_100m


def get_config():
    config = llama_100m.get_config()
    config.model.update(hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32)
    config.model.update(dtype="float32", remat="none")
    config.gist.update(num_sinks=8, window=32)
    config.data.update(vocab_size=1024, row_length=256, recall_records=128, recall_questions=2)
    config.optim.update(peak_lr=3e-3, warmup_steps=10)
    config.train.update(steps=40, batch_size=8, eval_every=40, checkpoint_every=40, eval_rows=16, eval_recall_rows=0)
    return config
