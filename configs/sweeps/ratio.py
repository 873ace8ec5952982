"""Compression ratio: 2, 4, 8, 16 raws a gist, at one window. The paper trains 4 and 8."""


def sweep(add):
    for ratio in (2, 4, 8, 16):
        add(**{"gist.ratio": ratio})
