"""What `llama_100m_1k.py` begins with: `base_8m.py` at 100M parameters, its four stages of longer and longer rows.

before=
for length in 128 256 512 1024; do
  run=runs/base_100m/$length
  python -m launch.train --config=configs/comparison/base_100m.py:$length --workdir=$run $before
  python -m launch.convert --input=$run --output=$run/plain --to=plain --platform=cpu
  before=--init_from=$run/plain
done

138M tokens in 8,400 steps of 16,384, fewer than at 8M: once rows of 128 tokens are learned, looking things up over
longer ones follows within some hundred steps. Learning rates are lower than at 8M, the model being wider. All
devices that there are share a batch (`mesh.data`).
"""

from configs.comparison import base_8m, llama_100m_1k

STEPS = {128: 5000, 256: 1300, 512: 700, 1024: 1400}


def get_config(length="128"):
    config = llama_100m_1k.get_config()
    config.method = "full"
    steps, small = STEPS[int(length)], base_8m.get_config(length)
    config.data.update(small.data)
    config.train.update(small.train)
    config.train.update(steps=steps, eval_every=steps, checkpoint_every=steps)
    if length == "128":
        config.optim.update(peak_lr=6e-4)
    return config
