"""Fine-tuning of the 8B model that configs/llama31_8b.py made, as in the paper: 1B tokens, r = 4.

python -m launch.train --config=configs/llama31_8b_sft.py --workdir=runs/llama31_8b_sft --init_from=runs/llama31_8b-hf

477 steps of 2.1M tokens, the loss on answers alone. runs/llama31_8b-hf is what launch.convert makes of runs/llama31_8b.
Shares of the four sources follow their numbers of rows unless --config.data.weights says otherwise.
Expect the speed of configs/llama31_8b.py, and see docs/training.md for the loss.
"""

from configs import _llama


def get_config():
    return _llama.finetuning("llama3.1-8b")
