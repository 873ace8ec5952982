"""Block sizes of the Hopper kernels, in one table by (head dim, ratio, length).

`python -m launch.tune_attention --backend=hopper` measures candidates and prints the rows to put here.
"""

from __future__ import annotations

from typing import NamedTuple


class ForwardBlocks(NamedTuple):
    """Keys of a key tile, key tiles in flight, and query tiles that a block takes one after another."""

    keys: int = 128
    stages: int = 2
    items: int = 4


class BackwardBlocks(NamedTuple):
    """How the backward kernel is cut into blocks.

    stages: query tiles in flight.
    heads: query heads whose blocks interleave.
    walk: query tiles that a block of the sinks' and gists' keys walks over, about; 0: all of them.
    sinks_alone: whether `walk` holds for the sinks' blocks alone.
    deterministic: whether additions to dQ happen in a fixed order.
    """

    stages: int = 2
    heads: int = 8
    walk: int = 0
    sinks_alone: bool = False
    deterministic: bool = True


# (head dim, ratios it holds for or None for all, shortest length in raws) -> blocks; the last row that fits wins.
# Ratios 2, 16 and 32 and lengths above 128K have what was timed at the next ratio and length.
FORWARD: tuple[tuple[int, tuple[int, ...] | None, int, ForwardBlocks], ...] = (
    (64, None, 0, ForwardBlocks()),
    (128, None, 0, ForwardBlocks()),
)
BACKWARD: tuple[tuple[int, tuple[int, ...] | None, int, BackwardBlocks], ...] = (
    (64, None, 0, BackwardBlocks()),
    (128, None, 0, BackwardBlocks()),
    (128, (2, 4), 24576, BackwardBlocks(heads=4)),
    (128, (2, 4), 49152, BackwardBlocks(heads=2)),
    (128, (8, 16, 32), 0, BackwardBlocks(heads=4)),
    (128, (8, 16, 32), 24576, BackwardBlocks(heads=2)),
    (128, (8,), 49152, BackwardBlocks(heads=1)),
    (128, (8,), 98304, BackwardBlocks(heads=2, walk=256)),
)

DOCUMENTS_WALK = 64


def _pick(table, dim: int, ratio: int, length: int):
    fits = [row[3] for row in table if row[0] == dim and (row[1] is None or ratio in row[1]) and length >= row[2]]
    return fits[-1]


def forward_blocks(dim: int, ratio: int, length: int) -> ForwardBlocks:
    """Blocks of the forward kernel for a head dim, a ratio and a context of `length` raws."""
    return _pick(FORWARD, dim, ratio, length)


def backward_blocks(dim: int, ratio: int, length: int, documents: bool) -> BackwardBlocks:
    """Blocks of the backward kernel for a head dim, a ratio and a context of `length` raws, packed `documents` or one.

    Every other block of a head waits until the sinks' blocks have passed. Over one document they pass in step; those of
    packed documents would wait for a walk over the whole row.
    """
    blocks = _pick(BACKWARD, dim, ratio, length)
    return blocks._replace(walk=DOCUMENTS_WALK, sinks_alone=True) if documents else blocks
