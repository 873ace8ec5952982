"""`methods.py` with chunks of 256 raws, a quarter of the rows of `llama_8m.py`."""

from configs.comparison import methods


def sweep(add):
    methods.sweep(add, chunk=256)
