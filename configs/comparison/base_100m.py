"""What `llama_100m_1k.py` begins with: `base_8m.py` at 100M parameters.

python -m launch.train --config=configs/comparison/base_100m.py --workdir=runs/base_100m
python -m launch.convert --input=runs/base_100m --output=runs/base_100m/hf --platform=cpu

5,000 steps of 16,384 tokens: 3.5 minutes of an H100 at the 395,000 tokens/s measured. Not run to its end: with
--config.train.steps=3500 --config.train.batch_size=64, 29M tokens in 73 s, the loss came to 2.5, which `base_8m.py` had
after as many and left for 0.87 by the end of its 82M.
"""

from configs.comparison import base_8m, llama_100m_1k


def get_config():
    config = llama_100m_1k.get_config()
    config.method = "full"
    small = base_8m.get_config()
    config.data.update(small.data)
    config.train.update(small.train)
    return config
