"""The comparison at 100M parameters on rows of 1,024 tokens, minutes of one GPU a run: a far shorter `llama_100m.py`.

python -m launch.train --config=configs/comparison/llama_100m_1k.py --config.method=METHOD \
    --init_from=runs/base_100m/1024/plain --workdir=runs/100m/METHOD

METHOD is `full` or `unigist` (r = 4). Both begin with the model of `base_100m.py`, on rows like those of `llama_8m.py`.
36M tokens a method; not run. What 16 layers of width 768 did from a far shorter base stands in docs/training.md.
"""

from configs.comparison import llama_8m, llama_100m


def get_config():
    config = llama_100m.get_config()
    small = llama_8m.get_config()
    config.model.max_position_embeddings = small.model.max_position_embeddings
    config.gist.update(small.gist)
    config.data.update(small.data, recall_records=36000)
    config.optim.update(peak_lr=5e-4)
    config.train.update(steps=4400, batch_size=8, eval_every=550, checkpoint_every=4400)
    return config
