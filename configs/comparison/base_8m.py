"""What the comparison at 8M parameters begins with: a model with full attention that looks things up over long rows.

before=
for length in 128 256 512 1024; do
  python -m launch.train --config=configs/comparison/base_8m.py:$length --workdir=runs/base_8m/$length $before
  python -m launch.convert --input=runs/base_8m/$length --output=runs/base_8m/$length/plain --to=plain --platform=cpu
  before=--init_from=runs/base_8m/$length/plain
done

As the paper's methods begin with a Llama, which reads long contexts. Repeated random sequences and pairs of key and
value: looking up is learned from these on rows of 128 tokens within some thousand steps, and then over twice the
distance at a time. Continued at once on rows of 1,024, full attention had not learned it after 12,000 steps, nor at
lower learning rates after 4,000 (docs/reproducing.md). 16,384 tokens a step; training loss at the end of each stage:
0.87, 0.47, 0.40, 0.20.
"""

from configs.comparison import llama_8m

STEPS = {128: 5000, 256: 2000, 512: 2000, 1024: 3000}
TOKENS = 16_384  # of a step


def get_config(length="128"):
    length = int(length)
    config = llama_8m.get_config()
    config.method = "full"
    config.data.update(row_length=length, recall_kinds="repeats,pairs", recall_records=98304)
    config.optim.update(peak_lr=1.5e-3 if length == 128 else 1e-3)
    config.train.update(steps=STEPS[length], batch_size=TOKENS // length)
    config.train.update(eval_every=STEPS[length], checkpoint_every=STEPS[length])
    return config
