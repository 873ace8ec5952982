"""Continued pre-training of Llama-3.2-1B-Instruct by the paper's recipe, which it does not apply to this size.

python -m launch.train --config=configs/llama32_1b.py --workdir=runs/llama32_1b --init_from=HF_DIRECTORY

7,629 steps of 2.1M tokens. On 8 GPUs: --config.train.accumulate=8. For r = 8 or 16: --config.gist.ratio=8; rows
prepared for 16 serve all three. docs/training.md says how data/prolong is prepared. At half of their peak 8 H100s
would make 359,000 tokens/s (--compile_only --topology=h100:8 --config.train.accumulate=8, 17 of 75 GiB each), so 16B in
12 hours; neither speed nor loss has been measured, and docs/training.md says what to hold the loss to.
"""

from configs import _llama


def get_config():
    return _llama.continued_pretraining("llama3.2-1b")
