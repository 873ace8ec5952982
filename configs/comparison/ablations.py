"""UniGist's ablations at the comparison's scale: sinks 0 / 16 / 128, window 0 / 32 / 128 / 512 (ratio 4).

python -m launch.sweep --config=configs/comparison/llama_8m.py --sweep=configs/comparison/ablations.py
"""


def sweep(add):
    add(name="sinks=128,window=128")
    for sinks in (0, 16):
        add(name=f"sinks={sinks}", **{"gist.num_sinks": sinks})
    for window in (0, 32, 512):
        add(name=f"window={window}", **{"gist.window": window})
