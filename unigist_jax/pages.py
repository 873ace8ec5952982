"""How many slots a cache is given: whole pages, on a ladder of few sizes.

A program is compiled for each number of slots. So capacities are whole pages: up to 32 of them any number, from there
on 16 sizes to each doubling. With ratio 4 that makes 96 sizes up to 131,072 tokens, and less than a sixteenth of one
is allocated in vain (beyond the last page of a small cache).
"""

from __future__ import annotations

from unigist_jax.layout import GistLayout

PAGE = 64  # gists: a key tile of the decoding kernels, and what one scale of a quantised cache serves
ANY = 32  # pages up to which there is every size


def gist_slots(layout: GistLayout, capacity: int) -> int:
    """Gist slots for `capacity` raws: one a unit, the one in progress included, rounded up to a size on the ladder."""
    return rung(-(-capacity // (layout.ratio * PAGE))) * PAGE


def token_slots(capacity: int) -> int:
    """Slots of full attention for `capacity` tokens, rounded up likewise."""
    return rung(-(-capacity // PAGE)) * PAGE


def rung(pages: int) -> int:
    """The smallest number of pages on the ladder that is at least `pages`."""
    stride = 1
    while pages > ANY * stride:
        stride *= 2
    return -(-pages // stride) * stride
