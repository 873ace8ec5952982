"""Why Activation Beacon recalls as UniGist does at 8M parameters: what `methods_8m.py` leaves open.

python -m launch.sweep --config=configs/comparison/llama_8m.py --sweep=configs/comparison/why_beacon.py \
    --train_flag=--init_from=runs/base_8m/1024/plain

Chunks of a sixteenth of a row, the paper's proportion, not a quarter. And nine rows of ten text, not one, for as many
steps as read the text half a dozen times.
"""


def sweep(add):
    beacon = {"method": "activation_beacon", "gist.chunk": 256}
    add(name="activation_beacon,chunk=64", **beacon | {"gist.chunk": 64})
    text = {"data.recall_weight": 0.1, "train.steps": 1500, "train.eval_every": 500, "train.checkpoint_every": 1500}
    add(name="activation_beacon,text", **beacon, **text)
    add(name="unigist,r=4,text", method="unigist", **text)
