"""Every trained method from the same initial weights, on the same tokens, for the same number of steps.

The training-free methods need no training: `launch.compare` evaluates them on the run `full`. Chunks are 512 raws where
the config has room for them (`configs/comparison/micro.py` has its own). Further seeds draw other rows in another
order, and other gists and sinks to begin with; their runs are called NAME,seed=N.
"""

CHUNK = 512


def sweep(add, chunk=CHUNK, seeds=1):
    for seed in range(seeds):
        name, further = (f",seed={seed}", {"train.seed": seed}) if seed else ("", {})
        add(name="full" + name, method="full", **further)
        add(name="unigist,r=4" + name, method="unigist", **further)
        add(name="unigist,r=8" + name, **{"method": "unigist", "gist.ratio": 8}, **further)
        add(name="activation_beacon" + name, **{"method": "activation_beacon", "gist.chunk": chunk}, **further)
        add(name="autocompressors" + name, **{"method": "autocompressors", "gist.chunk": chunk}, **further)
