"""What `llama_100m_1k.py` begins with: `base_8m.py` at 100M parameters, its four stages of longer and longer rows.

before=
for length in 128 256 512 1024; do
  run=runs/base_100m/$length
  python -m launch.train --config=configs/comparison/base_100m.py:$length --workdir=$run $before
  python -m launch.convert --input=$run --output=$run/plain --to=plain --platform=cpu
  before=--init_from=$run/plain
done

17,500 steps of 16,384 tokens, which have not been run. With 5,000, 1,570, 850 and 1,690 steps (the first at a peak of
6e-4) it had not learned to look things up: rows of 128 tokens were left at a loss of 1.30, `base_8m.py`'s at 0.87, and
those of 256, 512 and 1,024 at 2.5, 2.7 and 3.1 (docs/training.md). Such a stage is left by its loss rather than by its
steps: below 0.9, 0.6 and 0.55, where `base_8m.py` left it, with `--stop_at_step`. All devices that there are share a
batch (`mesh.data`).
"""

from configs.comparison import base_8m, llama_100m_1k

STEPS = {128: 8000, 256: 4000, 512: 3000, 1024: 2500}


def get_config(length="128"):
    config = llama_100m_1k.get_config()
    config.method = "full"
    steps, small = STEPS[int(length)], base_8m.get_config(length)
    config.data.update(small.data)
    config.train.update(small.train)
    config.train.update(steps=steps, eval_every=steps, checkpoint_every=steps)
    if length == "128":
        config.optim.update(peak_lr=8e-4)
    return config
