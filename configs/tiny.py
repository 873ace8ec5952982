"""A model of 0.9M parameters on the Python standard library's sources and short recall records, for a CPU.

python -m launch.train --config=configs/tiny.py --workdir=runs/tiny

About 3 minutes on 2 CPU cores; training loss 4.6, held-out perplexity 114 (Python 3.11, seed 0: docs/demo/report.md).
"""

from unigist_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(
        hidden_size=128,
        intermediate_size=352,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=10_000.0,
        tie_embeddings=True,
        dtype="float32",
    )
    config.gist.update(ratio=4, num_sinks=8, window=32)
    config.data.update(vocab_size=1024, row_length=512, recall_weight=0.25, recall_digits=4)
    config.optim.update(peak_lr=3e-3, warmup_steps=20, final_fraction=0.1)
    config.train.update(steps=150, batch_size=8, eval_every=100, eval_rows=32, checkpoint_every=100)
    return config
