"""The comparison at 8M parameters, for a minute of one GPU a run: `llama_100m.py`, smaller and shorter.

python -m launch.sweep --config=configs/comparison/llama_8m.py --sweep=configs/comparison/methods_8m.py

Rows of 1,024 tokens, 66M tokens a method. Small models learn recall by steps rather than by tokens: hence many small
batches, nine rows of ten for recall, and answers of three digits.
"""

from configs.comparison import llama_100m


def get_config():
    config = llama_100m.get_config()
    config.model.update(hidden_size=384, intermediate_size=704, num_layers=5, num_heads=4, num_kv_heads=2)
    config.model.max_position_embeddings = 1024
    config.data.update(vocab_size=2560, row_length=1024, recall_weight=0.9, recall_records=24576, recall_digits=3)
    config.optim.update(peak_lr=1.5e-3, warmup_steps=200)
    config.train.update(steps=4000, batch_size=16, eval_every=4000, checkpoint_every=4000)
    return config
