"""Continued pre-training of Llama-3.2-3B-Instruct as in the paper: 16B tokens in rows of 32,768, r = 4.

python -m launch.train --config=configs/llama32_3b.py --workdir=runs/llama32_3b --init_from=HF_DIRECTORY

7,629 steps of 2.1M tokens. On 8 GPUs: --config.train.accumulate=8. For r = 8 or 16: --config.gist.ratio=8; rows
prepared for 16 serve all three. docs/training.md says how data/prolong is prepared. Expect 16,600 tokens/s of
an H100, so 133,000 on 8 and 33 hours (measured on 1 with state in bfloat16). No run of it has told a loss
yet, and the paper names none: docs/training.md says what to hold it to.
"""

from configs import _llama


def get_config():
    return _llama.continued_pretraining("llama3.2-3b")
