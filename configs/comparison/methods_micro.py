"""`methods.py` with chunks of 64 raws, for `micro.py`."""

from configs.comparison import methods


def sweep(add):
    methods.sweep(add, chunk=64)
