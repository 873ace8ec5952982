"""The comparison at 100M parameters, for one 80 GB GPU a run.

python -m launch.sweep --config=configs/comparison/llama_100m.py --sweep=configs/comparison/methods.py

Rows of 2,048 tokens: the corpus, and recall records that are not the test's, with questions all along a row and the
loss on their answers alone. 1.05B tokens a method; not run. Few wide layers, and head dim 128, which the fastest
kernels take.
"""

from unigist_jax.config import default_config


def get_config():
    config = default_config()
    config.model.update(
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=8,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        rope_theta=10_000.0,
        max_position_embeddings=2048,
        tie_embeddings=True,
        dtype="bfloat16",
        remat="dots",
    )
    config.gist.update(ratio=4, num_sinks=128, window=128)
    config.data.update(
        vocab_size=4096,
        row_length=2048,
        heldout_fraction=0.1,
        join_documents=True,
        recall_weight=0.75,
        recall_records=65536,
        recall_kinds="repeats,pairs,multi_key,needle",
        recall_questions=24,
        recall_digits=4,
        recall_interleaved=True,
        recall_answer_only=True,
        recall_vocabulary=True,
    )
    config.optim.update(peak_lr=1e-3, warmup_steps=200, final_fraction=0.1)
    config.train.update(steps=8000, batch_size=64, log_every=10, eval_every=1000, eval_recall_rows=64)
    config.train.update(checkpoint_every=1000, accumulate=1)
    return config
