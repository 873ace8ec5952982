"""Compression ratio: how much is lost, and how much faster training gets, as a gist stands for more raws.

The paper trains 4 and 8. The config's window must be a multiple of 16.
"""


def sweep(add):
    for ratio in (2, 4, 8, 16):
        add(**{"gist.ratio": ratio})
