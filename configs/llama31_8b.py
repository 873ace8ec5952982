"""Continued pre-training of Llama-3.1-8B-Instruct as in the paper: 16B tokens in rows of 32,768, r = 4.

python -m launch.train --config=configs/llama31_8b.py --workdir=runs/llama31_8b --init_from=HF_DIRECTORY

7,629 steps of 2.1M tokens. On TPU v5p:4x4x4 as it stands, one row a device; on 8 GPUs of 80 GB with
--config.train.accumulate=8; on TPU v6e:4x4 as docs/training.md has it, beside the memory of a device on each. For r = 8
or 16: --config.gist.ratio=8; rows prepared for 16 serve all three.
docs/training.md says how data/prolong is prepared. Expect 7,100 tokens/s of an H100, 46% of its peak, so 57,000 on 8
and 3.2 days (measured on 2 with state in bfloat16, docs/training.md). No run of it has told a loss yet, and the paper
names none: docs/training.md says what to hold it to.
"""

from configs import _llama


def get_config():
    return _llama.continued_pretraining("llama3.1-8b")
