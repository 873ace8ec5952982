"""The comparison at 100M parameters on rows of 1,024 tokens, minutes of one GPU a run: a far shorter `llama_100m.py`.

python -m launch.train --config=configs/comparison/llama_100m_1k.py --config.method=METHOD \
    --init_from=runs/base_100m/1024/hf --workdir=runs/100m/METHOD

METHOD is `full` or `unigist` (r = 4). Both begin with the model of `base_100m.py`, on rows like those of `llama_8m.py`,
fewer of them facts among facts. One H100: 369,000 and 266,000 tokens/s; from a base of 29M tokens, held-out loss 3.59
(full, 3,500 steps) and 3.64 (UniGist, 3,391): docs/training.md.
"""

from configs.comparison import llama_8m, llama_100m


def get_config():
    config = llama_100m.get_config()
    small = llama_8m.get_config()
    config.model.max_position_embeddings = small.model.max_position_embeddings
    config.gist.update(small.gist)
    config.data.update(small.data, recall_records=24576, recall_kinds="repeats,pairs,multi_key,needle")
    config.train.update(steps=3500, batch_size=8, eval_every=500, checkpoint_every=3500)
    return config
