"""What the comparison at 8M parameters begins with: a model with full attention that can look things up, on short rows.

python -m launch.train --config=configs/comparison/base_8m.py --workdir=runs/base_8m
python -m launch.convert --input=runs/base_8m --output=runs/base_8m/plain --to=plain --platform=cpu

As the paper's methods begin with a Llama. Rows of 128 tokens, repeated random sequences and pairs of key and value
among them: looking up is learned from these within some thousand steps, and was not from long rows of facts and pairs
alone in 4,000. One H100: 5,000 steps of 16,384 tokens in 42 s (2.7M tokens/s), loss 0.87.
"""

from configs.comparison import llama_8m


def get_config():
    config = llama_8m.get_config()
    config.method = "full"
    config.data.update(row_length=128, recall_kinds="repeats,pairs", recall_records=98304)
    config.train.update(steps=5000, batch_size=128, eval_every=5000, checkpoint_every=5000)
    return config
