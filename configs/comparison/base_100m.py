"""What `llama_100m_1k.py` begins with: `base_8m.py` at 100M parameters.

python -m launch.train --config=configs/comparison/base_100m.py --workdir=runs/base_100m
python -m launch.convert --input=runs/base_100m --output=runs/base_100m/hf --platform=cpu

One H100: 3,500 steps of 8,192 tokens in 73 s (395,000 tokens/s), loss 2.5: too few to learn the repeated sequences.
"""

from configs.comparison import base_8m, llama_100m_1k


def get_config():
    config = llama_100m_1k.get_config()
    config.method = "full"
    config.data.update(base_8m.get_config().data)
    config.train.update(steps=3500, batch_size=64, eval_every=3500)
    return config
