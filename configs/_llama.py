"""What the recipes for Llama 3 share: UniGist's training of pretrained models (arXiv 2509.15763, section 4.1).

Both stages take batches of 64 rows of 32,768 raws, 2.1M tokens, and train all parameters with AdamW, its learning rate
rising to 1e-5 and falling on a cosine to half of it. Parameters and moments are float32, products bfloat16. The paper
names no weight decay, betas or clipping: those are the defaults here (0.1, 0.9 and 0.95, 1.0).
"""

import dataclasses

from unigist_jax.config import default_config
from unigist_jax.model.shapes import SHAPES

ROWS, ROW_LENGTH = 64, 32_768


def _config(shape, tokens, warmup_steps):
    config = default_config()
    model = dataclasses.asdict(SHAPES[shape]) | {"param_dtype": "float32", "remat": "attention"}
    config.model.update({name: value for name, value in model.items() if name != "attention_backend"})
    config.gist.update(ratio=4, num_sinks=128, window=128)
    config.data.update(row_length=ROW_LENGTH)
    config.optim.update(peak_lr=1e-5, warmup_steps=warmup_steps, final_fraction=0.5)
    config.train.update(
        steps=round(tokens / (ROWS * ROW_LENGTH)), batch_size=ROWS, eval_every=500, eval_rows=64, checkpoint_every=250
    )
    config.train.update(loss_chunk=1024, log_every=1)
    config.mesh.update(data=1, fsdp=-1)
    return config


def continued_pretraining(shape):
    """16B tokens of ProLong's 64K mixture, each sample split in two; 256 steps of warm-up."""
    config = _config(shape, tokens=16e9, warmup_steps=256)
    config.data.source = "data/prolong"
    return config


def finetuning(shape):
    """1B tokens of conversations and long documents, the loss on answers; 128 steps of warm-up."""
    config = _config(shape, tokens=1e9, warmup_steps=128)
    config.data.source = "data/magpie,data/longalpaca,data/booksum,data/ruler"
    config.train.update(eval_every=100, checkpoint_every=100)
    return config
