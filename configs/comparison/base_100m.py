"""What `llama_100m_1k.py` begins with: `base_8m.py` at 100M parameters, its four stages of longer and longer rows.

before=
for length in 128 256 512 1024; do
  python -m launch.train --config=configs/comparison/base_100m.py:$length --workdir=runs/base_100m/$length $before
  python -m launch.convert --input=runs/base_100m/$length --output=runs/base_100m/$length/hf --platform=cpu
  before=--init_from=runs/base_100m/$length/hf
done

12,000 steps of 16,384 tokens: 8 minutes of an H100 at the 395,000 tokens/s measured on rows of 128. They have not been
run so: the run in docs/training.md ended the first stage after 29M tokens at a loss of 2.5, which `base_8m.py` had
after as many and left for 0.87 by the end of its 82M.
"""

from configs.comparison import base_8m, llama_100m_1k


def get_config(length="128"):
    config = llama_100m_1k.get_config()
    config.method = "full"
    small = base_8m.get_config(length)
    config.data.update(small.data)
    config.train.update(small.train)
    return config
