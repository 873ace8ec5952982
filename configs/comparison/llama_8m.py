"""The comparison at 8M parameters, for about a minute of one GPU a run: `llama_100m.py`, smaller and shorter.

python -m launch.sweep --config=configs/comparison/llama_8m.py --sweep=configs/comparison/methods_8m.py \
    --train_flag=--init_from=runs/base_8m/1024/plain

Every method begins with the model of `base_8m.py`. Rows of 1,024 tokens, 82M tokens a method: small models learn
recall by steps rather than by tokens, hence many small batches, nine rows of ten for recall, and answers of three
digits. Two fifths of those are facts among facts. One H100: 2.4M tokens/s (full), 1.9M
(UniGist r=4 and Activation Beacon), 1.3M (AutoCompressors). Making the rows takes a CPU core two minutes first.
"""

from configs.comparison import llama_100m


def get_config():
    config = llama_100m.get_config()
    config.model.update(hidden_size=384, intermediate_size=704, num_layers=5, num_heads=4, num_kv_heads=2)
    config.model.max_position_embeddings = 1024
    config.gist.update(num_sinks=16, window=32)
    config.data.update(vocab_size=2560, row_length=1024, recall_weight=0.9, recall_records=98304, recall_digits=3)
    config.data.recall_kinds = "repeats,pairs,multi_key,needle,multi_key"
    config.optim.update(peak_lr=1e-3, warmup_steps=200)
    config.train.update(steps=5000, batch_size=16, eval_every=3000, checkpoint_every=5000)
    return config
