"""`methods.py` with chunks of 256 raws, a quarter of the rows of `llama_8m.py`, and two seeds."""

from configs.comparison import methods


def sweep(add):
    methods.sweep(add, chunk=256, seeds=2)
