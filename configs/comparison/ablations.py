"""UniGist's ablations at the comparison's scale: sinks 0 / 16 / 128, window 0 / 32 / 128 / 512 (ratio 4).

python -m launch.convert --input=runs/base_8m --output=runs/base_8m/plain --to=plain      # of base_8m.py, for any sinks
python -m launch.sweep --config=configs/comparison/llama_8m.py --sweep=configs/comparison/ablations.py \
    --train_flag=--init_from=runs/base_8m/plain
"""


def sweep(add):
    add(name="sinks=16,window=32")  # the comparison's own
    for sinks in (0, 128):
        add(name=f"sinks={sinks}", **{"gist.num_sinks": sinks})
    for window in (0, 128, 512):
        add(name=f"window={window}", **{"gist.window": window})
