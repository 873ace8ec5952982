"""Every trained method from the same initial weights, on the same tokens, for the same number of steps.

The training-free methods need no training: `launch.compare` evaluates them on the run `full`. Chunks are 512 raws where
the config has room for them (`configs/comparison/micro.py` has its own).
"""

CHUNK = 512


def sweep(add, chunk=CHUNK):
    add(name="full", method="full")
    add(name="unigist,r=4", method="unigist")
    add(name="unigist,r=8", **{"method": "unigist", "gist.ratio": 8})
    add(name="activation_beacon", **{"method": "activation_beacon", "gist.chunk": chunk})
    add(name="autocompressors", **{"method": "autocompressors", "gist.chunk": chunk})
