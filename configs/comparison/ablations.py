"""UniGist's ablations at the comparison's scale: sinks 0 / 16 / 128, window 0 / 32 / 128 / 512 (ratio 4).

python -m launch.sweep --config=configs/comparison/llama_8m.py --sweep=configs/comparison/ablations.py \
    --train_flag=--init_from=runs/base_8m/1024/plain

Each varies one of the comparison's 16 sinks and window of 32.
"""

STEPS = 5000


def sweep(add):
    add(name="sinks=16,window=32", **{"train.steps": STEPS})
    for sinks in (0, 128):
        add(name=f"sinks={sinks}", **{"gist.num_sinks": sinks, "train.steps": STEPS})
    for window in (0, 128, 512):
        add(name=f"window={window}", **{"gist.window": window, "train.steps": STEPS})
